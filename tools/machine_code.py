"""What is in compiled CUDA code: each kernel's registers, memory and instructions, by cuobjdump.

No GPU has to be there. Triton brings a cuobjdump with it; CUDA's toolkit has one if all of it is
installed.
"""

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# what an instruction does, by the start of its name; the first that fits
_KINDS = (
    ("tensor", r"U?(HMMA|HGMMA|IMMA|IGMMA|QGMMA|DMMA|BMMA|WARPGROUP)"),
    ("double", r"D(ADD|MUL|FMA|SETP|MNMX)"),
    ("convert", r"U?(F2|I2|FRND)"),
    ("local", r"(LDL|STL)"),
    ("shared", r"(LDS|STS|ATOMS|REDS)"),
    ("global", r"U?(LDG|LDGSTS|STG|LD|ST|ATOMG?|RED|BLKCP|TMA\w+|CCTL\w*)(?![A-Z])"),
    ("shuffle", r"(SHFL|VOTE|MATCH|REDUX)"),
    ("constant", r"U?LDCU?(?![A-Z])"),
    (
        "move",
        r"(U?MOV|IMAD\.MOV|U?SEL|U?CS2R|S2U?R|R2UR|U?P2U?R|R2P|MOVM|UMOV|U?PRMT)(?![A-Z])",
    ),
    (
        "control",
        r"(U?BRA|BRX|JMP|EXIT|CALL|RET|BAR|SYNCS|BSSY|BSYNC|BREAK|BMOV|WARPSYNC|YIELD|NANOSLEEP|ENDCOLLECTIVE|"
        r"DEPBAR|LDGDEPBAR|ARRIVES|MEMBAR|ERRBAR|FENCE|ACQBULK|PREEXIT|BPT|KILL|ELECT)",
    ),
    ("float", r"(F|H)(ADD|MUL|FMA|MNMX|SET|SETP|SEL|CHK|SWZADD)|MUFU"),
    (
        "integer",
        r"(U|V)?(IADD|IMAD|LOP|SHF|SHL|SHR|LEA|ISETP|ISET|IABS|IMNMX|POPC|FLO|BREV|SGXT|PLOP|"
        r"IDP|BMSK|VIADD|ISCADD|ICMP|IMUL)",
    ),
)
KINDS = (*(name for name, _ in _KINDS), "other")


@dataclass(frozen=True)
class Function:
    """One kernel as compiled for one architecture; memory in bytes.

    instructions: how often each is in the code, by its name up to the first point; without NOP
    kinds: the same by what it does, of ``KINDS``
    digest: of the code; the same code has the same one
    shared: static shared memory; what a launch asks for on top is not in the code
    """

    name: str
    architecture: int
    registers: int
    stack: int
    shared: int
    instructions: Counter = field(compare=False)
    kinds: Counter = field(compare=False)
    digest: str

    @property
    def length(self) -> int:
        """Instructions in all."""
        return self.kinds.total()


def find_cuobjdump() -> Path | None:
    """Triton's, or the toolkit's of CUDA_HOME, /usr/local/cuda or PATH."""
    folders = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    found = [Path(folder, "bin/cuobjdump") for folder in folders if folder]
    triton = importlib.util.find_spec("triton")  # which need not be imported
    if triton is not None and triton.origin:
        found.insert(0, Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    on_path = shutil.which("cuobjdump")
    return next((path for path in found if path.exists()), on_path and Path(on_path))


def read(path: Path) -> list[Function]:
    """The kernels in a library, an object file or a cubin, for every architecture that it has.

    Raises:
        RuntimeError: there is no cuobjdump, or it cannot read the file; in one line
    """
    tool = find_cuobjdump()
    if tool is None:
        raise RuntimeError("there is no cuobjdump (Triton's, CUDA_HOME, /usr/local/cuda or PATH)")
    command = [str(tool), "--dump-resource-usage", "--dump-sass", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    functions = list(_functions(done.stdout))
    if done.returncode or not functions:
        said = (done.stderr.strip() or "no kernel found").splitlines()[-1]
        raise RuntimeError(f"{tool} cannot read {path}: {said}")
    return functions


def _functions(text: str) -> Iterator[Function]:
    """From what cuobjdump prints: of each cubin first the resources, then the code."""
    usage: dict[str, dict[str, int]] = {}
    parts = re.split(r"^\s*Function : ?(\S+)$", text, flags=re.M)
    architecture = 0
    for name, code in zip([""] + parts[1::2], parts[::2], strict=True):
        if name:
            yield _function(name, architecture, usage[name], code)
        pattern = r"^Resource usage:|^\s*code for sm_(\d+)|^ Function (\S+):\n\s+(REG:.*)$"
        for found in re.finditer(pattern, code, re.M):
            if found[1]:
                architecture = int(found[1])
            elif found[2] is None:
                usage = {}
            else:
                numbers = re.findall(r"(REG|STACK|SHARED):(\d+)", found[3])
                usage[found[2]] = {what: int(number) for what, number in numbers}


def _function(name: str, architecture: int, usage: dict[str, int], code: str) -> Function:
    # the address, perhaps a predicate, the instruction and its operands
    lines = re.findall(
        r"^\s*/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P[0-9T]+ +)?)([A-Z][\w.]*)(.*?);", code, re.M
    )
    lines = [line for line in lines if line[1] != "NOP"]
    names, kinds = Counter(line[1].partition(".")[0] for line in lines), Counter()
    for full, count in Counter(line[1] for line in lines).items():
        kinds[kind_of(full)] += count
    digest = hashlib.sha256("\n".join(map("".join, lines)).encode()).hexdigest()[:12]
    resources = (usage["REG"], usage["STACK"], usage["SHARED"])
    return Function(short_name(demangled(name)), architecture, *resources, names, kinds, digest)


def kind_of(instruction: str) -> str:
    """Of ``KINDS``, by an instruction's name with its points: ``IMAD.MOV.U32`` is a move."""
    for kind, pattern in _KINDS:
        if re.match(pattern, instruction):
            return kind
    return "other"


def demangled(name: str) -> str:
    """A C++ name as one writes it; as it is if it is none, or if there is no libstdc++."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
    except OSError:
        return name
    demangle = library.__cxa_demangle
    demangle.restype = ctypes.c_void_p
    demangle.argtypes = [ctypes.c_char_p, *[ctypes.c_void_p] * 3]
    status = ctypes.c_int()
    found = demangle(name.encode(), None, None, ctypes.addressof(status))
    if not found:
        return name
    text = ctypes.string_at(found).decode()
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    free(found)
    return text


def short_name(function: str) -> str:
    """A demangled kernel without its namespaces and what it takes: ``stem_kernel<Float16, 4>``."""
    for noise in ("(anonymous namespace)::", "cifar_resnet_fast::", "(bool)", "(int)"):
        function = function.replace(noise, "")
    found = re.search(r"(\w+_kernel(?:<[^(]*>)?)\(", function)
    return found[1].replace(" >", ">") if found else function
