"""Two commits side by side: a repository with a stand-in for the package is built and measured."""

import json
import subprocess
from collections import Counter

import pytest

from bench import compare
from bench.compare import Ratio
from tools import machine_code, ptxas_report
from tools.machine_code import Function

SETUP = """
import json, pathlib, sys
if "broken" in pathlib.Path("csrc.txt").read_text():
    sys.exit("error: csrc.txt is broken")
folder = pathlib.Path(sys.argv[sys.argv.index("--build-lib") + 1], "cifar_resnet_fast")
folder.mkdir(parents=True)
for name in ("_build_info.json", "_C.abi3.so", "_cuda.abi3.so"):
    (folder / name).write_text("{}")
with open({log!r}, "a") as log:
    log.write("built\\n")
"""
PROGRAM = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
runs = pathlib.Path({log!r})
us = float(pathlib.Path("csrc.txt").read_text()) + runs.read_text().count("{suite}")
same = {{"suite": "{suite}", "card": "none", "date": "today", "dtype": "fp16"}}
same |= {{"phase": "training", "depth": 20}}
case = {{"kernel": "F1", "place": "8x8x64", "batch": 128, "implementation": "cuda"}}
lacking = {{**case, "kernel": "F2", "no_time": "wrong result: y"}}
lines = [same | case | {{"us": us}}, same | lacking]
(out / "rows.jsonl").write_text("\\n".join(map(json.dumps, lines)))
with runs.open("a") as log:
    log.write("{suite} " + pathlib.Path("csrc.txt").read_text() + "\\n")
"""


def git(folder, *words):
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with the tags slow, fast and broken; ``log`` beside it has what was run."""
    root, log = tmp_path / "repository", tmp_path / "log"
    (root / "cifar_resnet_fast/ops").mkdir(parents=True)
    (root / "cifar_resnet_fast/ops/__init__.py").touch()
    (root / "bench").mkdir()
    (root / "bench/__init__.py").touch()
    (root / "setup.py").write_text(SETUP.replace("{log!r}", repr(str(log))))
    for suite in ("trunk", "step"):
        program = PROGRAM.format(log=str(log), suite=suite)
        (root / f"bench/{suite}.py").write_text(program)
    (root / ".gitignore").write_text("*.so\n_build_info.json\nbuild/\n__pycache__/\n")
    git(tmp_path, "init", "-q", str(root))
    for tag, content in (("slow", "100"), ("fast", "50"), ("broken", "broken")):
        (root / "csrc.txt").write_text(content)
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", tag)
        git(root, "tag", tag)
    monkeypatch.setattr(compare, "ROOT", root)
    monkeypatch.setattr(compare, "device_architectures", lambda: [])
    return root


@pytest.fixture
def run(repository, tmp_path, capsys):
    """A function that compares: status, what was printed, and the lines on stderr."""

    def call(*arguments):
        folders = ("--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"))
        status = compare.main([*map(str, arguments), *folders])
        captured = capsys.readouterr()
        return status, captured.out, captured.err.splitlines()

    return call


def function(name="stem_kernel", architecture=80, registers=32, digest="same", **kinds):
    kinds = Counter({"float": 10, "tensor": 8} | kinds)
    return Function(name, architecture, registers, 0, 1024, Counter(), kinds, digest)


# --- what is run --------------------------------------------------------------------------------


def test_a_and_b_run_in_turn(run, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "device_architectures", lambda: [90])
    status, out, _ = run("slow", "fast", "--rounds", "2")
    assert status == 0
    turn = ["trunk 100", "trunk 50", "step 100", "step 50"]
    assert (tmp_path / "log").read_text().splitlines() == ["built", "built", *turn, *turn]
    # the stand-in's times: 100 and 102 of A, 51 and 53 of B
    assert "trunk F1 8x8x64 fp16 128 cuda" in out
    assert f"{101.0:10.2f} {52.0:10.2f}  {52 / 101:6.3f} (0.500 - 0.530) faster" in out
    assert "no time of A: wrong result: y, B: wrong result: y" in out


def test_what_is_built_is_kept(run, repository, tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "read", lambda path: [function()])
    log = tmp_path / "log"
    assert run("slow", "fast", "--arch", "80")[0] == 0
    assert log.read_text() == "built\nbuilt\n"
    status, out, err = run("slow", "fast", "--arch", "80")
    assert (status, err) == (0, [])
    assert "1 kernels have the same machine code" in out
    assert "not kept at slow, fast" in out
    assert log.read_text() == "built\nbuilt\n"
    monkeypatch.setattr(machine_code, "read", lambda path: [function(architecture=90)])
    assert run("slow", "fast", "--arch", "90")[0] == 0  # for others it is built again
    assert log.read_text().count("built") == 4


def test_built_libraries_need_no_compiler(run, repository, tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "read", lambda path: [function(digest=path.read_text())])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file in ("_build_info.json", "_C.abi3.so", "_cuda.abi3.so"):
            (tmp_path / name / file).write_text(f"{name} {file}")
    both = ("--library-a", tmp_path / "one", "--library-b", tmp_path / "two")
    status, out, _ = run("slow", "slow", *both)
    assert status == 0
    assert "stem_kernel, sm_80: registers 32" in out  # the code differs
    assert not (tmp_path / "log").exists()
    # and the folder of a checkout has its own
    (first, second) = sorted((tmp_path / "cache").iterdir())
    assert run(first, second, "--static")[0] == 0


def test_when_the_time_is_over_it_says_so(run, monkeypatch):
    monkeypatch.setattr(compare, "device_architectures", lambda: [90])
    status, out, err = run("slow", "fast", "--minutes", "0.0001")
    assert status == 2
    assert "the time is over: " in err[-2]
    assert "nothing was measured in --minutes 0.0001" in err[-1]
    assert " B / A " not in out


# --- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing", "fast"), "nothing is neither a commit in"),
        (("slow", "broken"), "broken cannot be built (error: csrc.txt is broken): see"),
        (("slow", "fast", "--library-a", "nowhere"), "--library-a: there is no _cuda.abi3.so in"),
    ],
    ids=["no-commit", "broken", "no-library"],
)
def test_an_error_is_one_line(arguments, words, run):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err[-1].startswith("python -m bench.compare: ")
    assert words in err[-1]


def test_folders_must_be_checkouts_with_libraries(run, repository, tmp_path):
    assert "is no checkout of cifar_resnet_fast" in run(tmp_path, "fast")[2][-1]
    assert "does not exist: build it, or name a commit" in run(repository, "fast")[2][-1]


def test_a_checkout_that_was_changed_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "read", lambda path: [function()])
    run("slow", "fast", "--arch", "80")
    first = next(
        f for f in (tmp_path / "cache").iterdir() if "100" in (f / "csrc.txt").read_text()
    )
    (first / "csrc.txt").write_text("101")
    status, _, err = run("slow", "fast", "--arch", "80")
    assert status == 2
    assert f"{first} has changed files, csrc.txt: delete the folder" in err[-1]
    git(first, "checkout", "-q", "fast", "--force")
    assert "is no checkout of" in run("slow", "fast", "--arch", "80")[2][-1]


def test_an_architecture_that_is_not_there_is_named(run, monkeypatch):
    monkeypatch.setattr(machine_code, "read", lambda path: [function(architecture=80)])
    status, _, err = run("slow", "fast", "--arch", "86")
    assert status == 2
    assert "has machine code for sm_80, not for sm_86" in err[-1]


def test_a_program_without_rows_is_named(run, repository, monkeypatch):
    monkeypatch.setattr(compare, "device_architectures", lambda: [90])
    git(repository, "checkout", "-q", "fast")
    (repository / "bench/trunk.py").write_text("raise SystemExit('no kernels here')")
    git(repository, "commit", "-q", "-a", "-m", "silent")
    status, _, err = run("slow", "HEAD")
    assert status == 2
    assert "bench.trunk of HEAD failed: no kernels here; see " in err[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--depth 21", "--depth must be 6n + 2"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--rounds 0", "--rounds must be at least 1, got 0"),
        ("--minutes 0", "--minutes must be more than 0, got 0"),
    ],
)
def test_flags_are_checked(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main(["a", "b", *arguments.split()])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


# --- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [([10, 12], [8, 9], "faster"), ([10, 12], [13, 14], "slower"), ([10, 12], [11, 9], "")],
)
def test_only_a_ratio_beyond_its_spread_has_a_verdict(a, b, verdict):
    ratio = Ratio.of(a, b)
    assert ratio.low <= ratio.middle <= ratio.high
    assert ratio.verdict == verdict


def test_what_differs_in_the_code_is_told():
    a = [function(), function("sgd_kernel"), function("pool_kernel")]
    b = [function(), function("sgd_kernel", 80, 40, "other", float=5, local=3), function("new")]
    assert compare.code_lines(a, b) == [
        "sgd_kernel, sm_80: registers 32 -> 40 (1.25), stack 0, shared 1024, "
        "length 18 -> 16 (0.89), spilled 0 -> 3",
        "    local 0 -> 3, float 10 -> 5 (0.50)",
        "pool_kernel, sm_80: only in A, 32 registers, 18 instructions",
        "new, sm_80: only in B, 32 registers, 18 instructions",
        "1 kernels have the same machine code",
    ]


def test_what_an_image_costs_is_told(repository, run, monkeypatch):
    monkeypatch.setattr(machine_code, "read", lambda path: [function()])
    one = {"tensor": 9, "shared": 20, "sectors": 64, "wavefronts": 40}
    for tag, wavefronts in (("before", 40), ("after", 24)):
        counts = {
            name: {"roles": {"producer": {"image": one}, "other": {"image": {**one, **more}}}}
            for name, more in (("F1", {}), ("B1", {"wavefronts": wavefronts}))
        }
        git(repository, "checkout", "-q", "fast")
        kept = repository / "bench/kernel_counts.json"
        kept.write_text(json.dumps({"kernels": counts}))
        git(repository, "add", "-A")
        git(repository, "commit", "-q", "-m", tag)
        git(repository, "tag", tag)
    _, out, _ = run("before", "after", "--arch", "80")
    assert "B1: tensor 18, shared 40, sectors 128, wavefronts 80 -> 64 (0.80)" in out
    assert "F1:" not in out
    assert "1 kernels cost an image the same" in out


# --- machine code -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [
        ("HMMA.16816.F32", "tensor"),
        ("IMAD.MOV.U32", "move"),
        ("IMAD.WIDE", "integer"),
        ("LDG.E.128", "global"),
        ("LDGSTS.E.BYPASS.128", "global"),
        ("LDGDEPBAR", "control"),
        ("LDSM.16.MT88.4", "shared"),
        ("LDL.64", "local"),
        ("LDC.64", "constant"),
        ("HFMA2.MMA", "float"),
        ("F2FP.PACK_AB", "convert"),
        ("FSETP.GT.AND", "float"),
        ("DADD", "double"),
        ("BRA.DIV", "control"),
        ("STG.E", "global"),
        ("STS.64", "shared"),
        ("SHFL.BFLY", "shuffle"),
        ("SHF.R.U32.HI", "integer"),
        ("TEX", "other"),
    ],
)
def test_kinds(instruction, kind):
    assert machine_code.kind_of(instruction) == kind


def test_a_file_without_code_is_named(tmp_path):
    if machine_code.find_cuobjdump() is None:
        pytest.skip("there is no cuobjdump")
    (tmp_path / "empty.cubin").touch()
    with pytest.raises(RuntimeError, match="cannot read .*empty.cubin: "):
        machine_code.read(tmp_path / "empty.cubin")


def test_without_cuobjdump_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "find_cuobjdump", lambda: None)
    with pytest.raises(RuntimeError, match="there is no cuobjdump"):
        machine_code.read(tmp_path / "library.so")


SOURCE = """
namespace cifar_resnet_fast {
template <int N> __global__ void same_kernel(float* x) { x[threadIdx.x] += N; }
template __global__ void same_kernel<3>(float*);
__global__ void changed_kernel(float* x, float a) {
  __shared__ float kept[SIZE];
  kept[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float sum = 0;
  #pragma unroll
  for (int i = 0; i < SIZE; ++i) sum = sum * a + kept[i];
  x[threadIdx.x] = sum;
}
}
"""


@pytest.mark.slow
@pytest.mark.skipif(
    ptxas_report.find_nvcc() is None or machine_code.find_cuobjdump() is None,
    reason="needs nvcc and cuobjdump",
)
def test_compiled_code_is_compared(tmp_path):
    sides = []
    for size in (32, 64):
        source = tmp_path / f"{size}.cu"
        source.write_text(SOURCE)
        cubin = source.with_suffix(".cubin")
        flags = (f"-DSIZE={size}", "-cubin", "-arch=sm_86")
        command = [ptxas_report.find_nvcc(), *flags, source, "-o", cubin]
        subprocess.run(command, check=True)
        sides.append(machine_code.read(cubin))
    few, many = ({f.name: f for f in side} for side in sides)
    assert few.keys() == many.keys() == {"same_kernel<3>", "changed_kernel"}
    assert few["same_kernel<3>"] == many["same_kernel<3>"]
    few, many = few["changed_kernel"], many["changed_kernel"]
    assert (few.architecture, few.shared, many.shared) == (86, 128, 256)
    assert many.kinds["float"] - few.kinds["float"] == 32
    assert few.kinds["other"] == many.kinds["other"] == 0
    first, second, last = compare.code_lines(*sides)
    assert first.startswith("changed_kernel, sm_86: registers")
    assert "shared 128 -> 256 (2.00)" in first
    assert "float" in second
    assert last == "1 kernels have the same machine code"
