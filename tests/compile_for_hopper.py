"""Compiles the Triton kernels for sm_90, no GPU needed: python tests/compile_for_hopper.py

A number behind a kernel's name is the size of a head. Prints one JSON object per kernel: the bytes
of every load and asynchronous copy in the PTX, and what cuobjdump says of registers and stack.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as backend
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent))

import kernel
from fast import gpu

KERNELS = [("attend_chunk", 64), ("attend_chunk", 128), ("merge_chunks", 64), ("score", None),
           ("select", None)]
TYPES = {
    "q": "*bf16", "k": "*bf16", "v": "*bf16", "idx": "*i32", "sums": "*fp32", "top": "*fp32",
    "total": "*fp32", "scale": "fp32", "queries": "*fp32", "int8_codes": "*i8", "scales": "*fp32",
    "codes": "*i16", "histogram": "*i32", "position": "*i64", "num_chosen": "*i64"}
# `out` of attend_chunk is a sum, that of merge_chunks is the result; k of bin_of_kth is no pointer
OUT = {"attend_chunk": "*fp32", "merge_chunks": "*bf16"}


def compiled(name: str, D: int | None):
    """The kernel as the default budget and a Llama of 4 query heads per KV head launch it."""
    constants = {
        "attend_chunk": {"N": 4, "NP": 16, "D": D, "DP": D, "CHUNK": 128, "BLOCK": 64,
                         "FLOAT32": False},
        "merge_chunks": {"D": D, "DP": D, "CP": 16},
        "score": {"E": 32, "LINE": gpu.LINE, "BLOCK": gpu.BLOCK, "BINS": gpu.BINS,
                  "MAX_HALF": gpu.MAX_HALF},
        "select": {"BLOCK": 4096, "BINS": gpu.BINS}}[name]
    function = getattr(gpu if name in ("score", "select") else kernel, name)
    types = TYPES | {"out": OUT.get(name)}
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    # What a launch finds out by itself: addresses and strides are multiples of 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n].startswith("*") or n in ("K", "S") or n[1:2] == "_"
               or n.startswith("row_")}
    values = {(i,): constants[n] for i, n in enumerate(names) if n in constants}
    return triton.compile(ASTSource(function, signature, values, aligned),
                          target=GPUTarget("cuda", 90, 32))


def resources(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(backend).parent / "bin" / "cuobjdump"
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True,
                               text=True)
    return shown.stdout.strip().splitlines()[-1]


for name, D in KERNELS:
    asm = compiled(name, D).asm
    copies = re.findall(r"cp\.async\.\w+\.shared\.global +\[[^]]*\], *\[[^]]*\], *(\w+)",
                        asm["ptx"])
    loads = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", asm["ptx"])
    print(json.dumps({
        "name": f"{name} {D}" if D else name,
        "copies": [int(n, 16) for n in copies],
        "loads": [int(n or 1) * int(bits) // 8 for n, bits in loads],
        "usage": resources(asm["cubin"])}), flush=True)
