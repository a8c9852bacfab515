"""Compiles the Triton kernels for sm_90, no GPU needed: python tests/compile_for_hopper.py

`dense` is `attend` without indices; a number is the size of a head. Prints a JSON object for each:
bytes of every wide load and asynchronous copy in the PTX, and what cuobjdump says of registers and
stack.
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
from cpu.loops import LINE

NAMES = ("attend 64", "attend 128", "dense 64", "dense 128", "merge", "score", "select",
         "renew 128")
KINDS = {"idx": "*i32", "sums": "*fp32", "tops": "*fp32", "totals": "*fp32", "scale": "fp32",
         "scales": "*fp32", "codes": "*i16", "due": "*i32", "histogram": "*i32",
         "positions": "*i64", "wants": "*i64", "out": "*bf16",
         "k": "*bf16", "v": "*bf16", "tokens": "*i32", "had": "*i32",
         "places": "*i32", "missed": "*i64", "table": "*bf16", "old": "*bf16", "new": "*bf16"}


def compiled(name: str, D: int):
    sizes = {"N": 4, "E": 32, "HALF": kernel.HALF, "D": D, "DP": D, "EXACT": False, "CHUNK": 128,
             "BINS": kernel.BINS, "ROW": 2 * D, "RP": 2 * D}
    if name == "dense":
        name, sizes["idx"] = "attend", None
    sizes |= {"attend": {"NP": 16, "BLOCK": 64}, "merge": {"CP": 16},
              "score": {"BLOCK": kernel.BLOCK, "LINE": LINE}, "select": {"BLOCK": 4096},
              "renew": {"BLOCK": 32}}[name]
    kinds = KINDS | {"q": "*bf16" if name == "attend" else "*fp32",
                     "k": "*i8" if name == "score" else "*bf16"}
    function = getattr(kernel, name)
    names = function.arg_names
    constants = {(i,): sizes[n] for i, n in enumerate(names) if n in sizes}
    signature = {n: "constexpr" if n in sizes else kinds.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n].startswith("*") or n in ("K", "S") or "_" in n}
    return triton.compile(ASTSource(function, signature, constants, aligned),
                          target=GPUTarget("cuda", 90, 32))


for words in NAMES:
    name, *size = words.split()
    asm = compiled(name, int(*size or [64])).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run([Path(backend).parent / "bin" / "cuobjdump",
                                "--dump-resource-usage", file.name], capture_output=True,
                               text=True).stdout
    copies = re.findall(r"cp\.async\.\w+\.shared\.global +\[[^]]*\], *\[[^]]*\], *(\w+)",
                        asm["ptx"])
    loads = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", asm["ptx"])
    print(json.dumps({"name": words, "copies": [int(n, 16) for n in copies],
                      "loads": [int(n or 1) * int(bits) // 8 for n, bits in loads],
                      "usage": usage.strip().splitlines()[-1]}), flush=True)
