"""The installed package: header, library, C programs, imports, command line."""

import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import fastnorm
from fastnorm import backends, install

ROOT = Path(__file__).parents[1]
CC = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
needs_cc = pytest.mark.skipif(CC is None, reason="no C compiler here")
needs_library = pytest.mark.skipif(
    isinstance(backends.load("native"), str), reason="no native library here"
)
STRICT = ["-Wall", "-Wextra", "-pedantic", "-Werror"]


def run(*command, **keywords):
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=1500, **keywords
    )


def build(source, output, *flags):
    library = Path(fastnorm.get_library())
    done = run(
        CC,
        "-std=c99",
        *STRICT,
        source,
        "-o",
        output,
        f"-I{fastnorm.get_include()}",
        library,
        f"-Wl,-rpath,{library.parent}",
        "-lm",
        "-lpthread",
        *flags,
    )
    assert done.returncode == 0, done.stderr


@needs_cc
@needs_library
@pytest.mark.parametrize(
    "source", ["examples/embed.c", "tests/test_library.c", "tests/test_attack.c"]
)
def test_c_program_runs_without_python(source, tmp_path):
    build(ROOT / source, tmp_path / "program")
    done = run(tmp_path / "program", env={"PATH": ""}, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_cc
@needs_library
def test_a_program_may_have_set_openmps_threads(tmp_path):
    """Their rounding mode and traps, by a program compiled with OpenMP too."""
    if "omp" not in Path(install.get_pkgconfig_dir(), "fastnorm.pc").read_text():
        pytest.skip("built without OpenMP")
    build(ROOT / "tests/test_attack.c", tmp_path / "program", "-fopenmp")
    done = run(tmp_path / "program", 10, env={"PATH": ""}, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_cc
@pytest.mark.parametrize(("compiler", "standard"), [("gcc", "c99"), ("g++", "c++11")])
def test_header_compiles(compiler, standard, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    source = tmp_path / ("header.c" if compiler == "gcc" else "header.cc")
    source.write_text("#include <fastnorm.h>\nint main(void) { return FASTNORM_OK; }\n")
    done = run(
        compiler,
        f"-std={standard}",
        *STRICT,
        f"-I{fastnorm.get_include()}",
        "-c",
        source,
        "-o",
        tmp_path / "header.o",
    )
    assert done.returncode == 0, done.stderr


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm here")
def test_library_needs_no_python_and_exports_only_its_names():
    undefined = run("nm", "-D", "--undefined-only", fastnorm.get_library()).stdout
    assert undefined
    assert " Py" not in undefined
    assert " _Py" not in undefined
    defined = run("nm", "-D", "--defined-only", fastnorm.get_library()).stdout.split()[2::3]
    header = (Path(fastnorm.get_include()) / "fastnorm.h").read_text()
    listed = re.findall(r"fastnorm_\w+", (ROOT / "fastnorm/kernels/libfastnorm.map").read_text())
    assert sorted(defined) == listed
    assert set(re.findall(r"\b(fastnorm_\w+)\(\n?[^)*]", header)) == set(listed)


def test_import_brings_numpy_and_nothing_else():
    heavy = ("numba", "torch", "matplotlib", "sklearn", "scipy", "rich", "dask")
    script = f"import sys, fastnorm; print([m for m in {heavy!r} if m in sys.modules])"
    assert run(sys.executable, "-c", script).stdout.strip() == "[]"


def test_version():
    assert fastnorm.__version__.count(".") == 2
    native = backends.load("native")
    if not isinstance(native, str):
        major, minor, patch = map(int, fastnorm.__version__.split("."))
        assert native.version() == major * 10000 + minor * 100 + patch


def test_explain(capsys):
    fastnorm.explain()
    text = capsys.readouterr().out
    assert "chosen" in text
    assert all(name in text for name in backends.NAMES)
    fastnorm.explain(np.zeros(3), backend="reference")
    assert "not asked: backend='reference'" in capsys.readouterr().out
    fastnorm.explain(np.zeros(3, int))
    assert "no backend: arrays of int64" in capsys.readouterr().out


def test_without_the_native_backend_the_reference_serves(monkeypatch, capsys):
    monkeypatch.setitem(backends._loaded, "native", "cannot be imported: no compiler")
    monkeypatch.setattr("fastnorm.config._chosen", {})
    monkeypatch.setattr("fastnorm.call.whole_forward", lambda *_: None)
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    assert fastnorm.layer_norm(x, 4).shape == (3, 4)
    with pytest.raises(ValueError, match="backend 'native' cannot be imported: no compiler"):
        fastnorm.layer_norm(x, 4, backend="native")
    fastnorm.explain()
    assert "cannot: cannot be imported: no compiler" in capsys.readouterr().out


def test_threads_setting():
    before = fastnorm.get_num_threads()
    assert before >= 1
    try:
        fastnorm.set_num_threads(3)
        assert fastnorm.get_num_threads() == 3
    finally:
        fastnorm.set_num_threads(0)
    script = "import fastnorm; print(fastnorm.get_num_threads())"
    done = run(sys.executable, "-c", script, env=os.environ | {"FASTNORM_NUM_THREADS": "5"})
    assert done.stdout.strip() == "5"


def test_environment_names_the_backend():
    script = "import fastnorm; fastnorm.explain()"
    done = run(sys.executable, "-c", script, env=os.environ | {"FASTNORM_BACKEND": "reference"})
    assert "reference  chosen" in done.stdout


@pytest.fixture
def cifar(tmp_path):
    """A few images in the format of the CIFAR-10 python batches; the label is the red."""
    rng = np.random.default_rng(0)
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        labels = rng.integers(0, 10, 60)
        data = rng.integers(0, 256, (60, 3072), dtype=np.uint8)
        data[:, :1024] = (labels * 25)[:, None]
        with (tmp_path / name).open("wb") as file:
            pickle.dump({b"data": data, b"labels": labels.tolist(), b"batch_label": b""}, file)
    return tmp_path


def test_cifar10_loader(cifar):
    from fastnorm.demo import data

    images = data.cifar10(cifar)
    assert images.train_x.shape == (120, 3, 32, 32)
    assert images.test_x.dtype == np.float32
    assert -1 <= images.train_x.min() < images.train_x.max() <= 1
    np.testing.assert_allclose(
        (images.test_x[:, 0, 0, 0] + 1) * 127.5 / 25, images.test_y, atol=1e-5
    )


def test_demo(cifar, capsys):
    from fastnorm.__main__ import main

    plot = cifar / "plot.png"
    assert main(["demo", "--data", str(cifar), "--epochs", "2", "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "with batch norm" in capsys.readouterr().out
    assert main(["demo", "--data", str(cifar / "missing")]) == 1
    assert "no CIFAR-10 python batches" in capsys.readouterr().err


def test_batch_norm_is_ahead_in_the_first_epochs():
    from fastnorm.demo import data, lenet

    images = data.digits()
    without = lenet.train(images, False, 2, 0.01, 64, 0)
    with_batch_norm = lenet.train(images, True, 2, 0.01, 64, 0)
    assert with_batch_norm[0] > without[0] + 5
    assert with_batch_norm[1] > 85


@needs_library
def test_scripts_of_the_benchmarks():
    """They know fastnorm.h's structs by heart."""
    folder = ROOT / "benchmarks"
    if not folder.exists():
        pytest.skip("no source here")
    library = fastnorm.get_library()
    for only, *extra in (
        ("group+silu NCHW 2x1280x8x8",), ("batch backward NHWC 1x64x8x8",), ("rms 64x64",),
        ("rms 64x64", "--between"), ("rms 64x64", "--pipeline", "--onednn"),
    ):
        if extra:
            pytest.importorskip("torch")
        found = run(sys.executable, folder / "compare.py", library, library, "--only", only,
                    "--seconds", 0.01, *extra)
        assert f"{only} " in found.stdout, found.stderr
    found = run(sys.executable, folder / "sweep.py", "group", "--layout", "NHWC", "--tail", "3x3",
                "--groups", 2, "--first", 2, "--second", "4,6", "--seconds", 0.01, "--behind", 16)
    assert len(found.stdout.split()) == 5, found.stderr
    sizes = "import cost_model as m; print(m.workspace(m.Cell('batch', 0, 'NCHW', (4, 16, 7, 7))))"
    found = run(sys.executable, "-c", sizes, env=os.environ | {"PYTHONPATH": str(folder)})
    assert int(found.stdout) > 0, found.stderr


@needs_library
def test_instructions_are_counted():
    script = ROOT / "benchmarks" / "instructions.py"
    tools = all(shutil.which(tool) for tool in ("cc", "objdump"))
    if not (script.exists() and tools and platform.machine() == "x86_64"):
        pytest.skip("no source, or not the tools and the processor it takes")
    size = ("forward", 64, 1, 1, 64, 1, 1, "--least", 0.5)
    found = run(sys.executable, script, *size, check=False)
    if "may be traced" in found.stderr:
        pytest.skip(found.stderr)
    total, _, first = found.stdout.partition("in all")
    assert 10 < float(total) < 1000, found.stderr
    assert "rows_forward" in first
    assert "as they lie" in first


@needs_library
@pytest.mark.parametrize("only", ["layer NCHW 32x768", "group backward NHWC 2x96", "rms 64x768",
                                  "layer backward 64x768", "batch backward NCHW 16x100"])
def test_the_least_kernel_is_right(only):
    script, cpuinfo = ROOT / "benchmarks" / "least.py", Path("/proc/cpuinfo")
    if not (script.exists() and shutil.which("cc") and cpuinfo.exists()
            and "avx512dq" in cpuinfo.read_text()):
        pytest.skip("no source, no compiler, or no AVX-512")
    found = run(sys.executable, script, "--only", only, "--seconds", 0.01)
    assert f"{only}" in found.stdout, found.stdout + found.stderr
    assert "of the least" in found.stdout


def test_the_documents_tables_are_those_of_the_measurements():
    script = ROOT / "benchmarks" / "tables.py"
    if not script.exists():
        pytest.skip("no source here")
    found = run(sys.executable, script, "--check", check=False)
    assert found.returncode == 0, found.stderr


@needs_library
def test_bench(tmp_path, capsys):
    """The table, the JSON and the plot of one cell; a wrong contender is seen."""
    import json

    from fastnorm.__main__ import main
    from fastnorm.bench import cells, contenders, run

    saved, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    command = ["bench", "--only", "group NCHW 2x96", "--seconds", "0.01", "--json", str(saved)]
    assert main([*command, "--plot", str(plot), "--contenders", "fastnorm,PyTorch,NumPy"]) == 0
    (row,) = json.loads(saved.read_text())["cells"].values()
    assert set(row["times"]) == {"fastnorm", "PyTorch", "NumPy"}
    assert row["wrong"] == []
    assert 0 < row["floor"] < 1
    assert plot.exists()
    assert plot.with_suffix(".svg").exists()
    assert "geometric means over the floor" in capsys.readouterr().out
    assert main(["bench", "--contenders", "oneMKL"]) == 2

    def wrong(problem):
        call = contenders.native(problem)
        return lambda: call() * np.float32(1.01)

    cell = next(c for c in cells.cells() if c.tiny)
    assert run.run_cell(cell, {"wrong": wrong}, 1, 0.01, np.float32)["wrong"] == ["wrong"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_contender_is_right_in_every_cell(dtype):
    """On small stand-ins of the benchmark's cells."""
    import dataclasses

    from fastnorm.bench import cells, contenders

    who = contenders.available(("fastnorm", "PyTorch", "NumPy"))
    seen = set()
    for cell in cells.cells():
        if cell.family in seen or cell.tiny:
            continue
        seen.add(cell.family)
        shape = (2, 32, *(min(s, 5) for s in cell.shape[2:]))
        problem = contenders.Problem(dataclasses.replace(cell, shape=shape), 2, dtype)
        wanted = contenders.native(problem, "reference")().copy()
        for name, contender in who.items():
            if cell.after and name not in contenders.FUSING:
                continue
            call = contender(problem)
            if call is not None:
                problem.out.fill(np.nan)
                error = np.max(np.abs(call() - wanted))
                assert error < 1e-4 * np.max(np.abs(wanted)), (str(cell), name)


def test_a_source_distribution_has_every_source(tmp_path):
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    pytest.importorskip("setuptools")
    pytest.importorskip("Cython")
    tracked = run(git, "ls-files", "fastnorm", "include", "tests", "examples", cwd=ROOT).stdout
    done = run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.iterdir())) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked.split()) <= held


def test_every_promise_names_tests_that_exist():
    promises = (ROOT / "docs" / "promises.md").read_text()
    sources = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*")}
    named = 0
    for row in (line for line in promises.splitlines() if line.startswith("| ")):
        held_by = row.split("|")[2]
        files = re.findall(r"test_\w+\.(?:py|c)\b", held_by)
        for name in re.findall(r"`(test_\w+)`", held_by):
            named += 1
            assert any(re.search(rf"\b{name}\(", sources[file]) for file in files), name
    assert named > 30
