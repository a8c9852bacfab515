"""Compiles kernel.attend for sm_90 without a GPU: python tests/compile_for_hopper.py HEAD_DIM

Prints one JSON object: the sizes of its asynchronous copies, and what cuobjdump says of registers.
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

D = int(sys.argv[1])
names = kernel.attend.arg_names
constants = {"N": 4, "NP": 16, "D": D, "DP": D, "CHUNK": 128, "BLOCK": 64, "EXACT": False}
kinds = {"idx": "*i32", "sums": "*fp32", "tops": "*fp32", "totals": "*fp32", "scale": "fp32"}
kinds |= {name: "*bf16" for name in "qkv"} | {name: "constexpr" for name in constants}
signature = {name: kinds.get(name, "i32") for name in names}
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
           if signature[name].startswith("*") or name == "K" or "_" in name}
source = ASTSource(kernel.attend, signature,
                   {(names.index(name),): value for name, value in constants.items()}, aligned)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(compiled.asm["cubin"])
    file.flush()
    usage = subprocess.run([Path(backend).parent / "bin" / "cuobjdump", "--dump-resource-usage",
                            file.name], capture_output=True, text=True).stdout
copies = re.findall(r"cp\.async\.\w+\.shared\.global +\[[^]]*\], *\[[^]]*\], *(\w+)",
                    compiled.asm["ptx"])
print(json.dumps({"copies": copies, "usage": usage.strip().splitlines()[-1]}))
