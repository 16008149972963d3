"""libfastnorm in other people's builds: pkg-config, CMake, ctypes, Rust, and under a prefix."""

import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from test_install import CC, ROOT, STRICT, needs_cc, needs_library, run

import fastnorm
from fastnorm.__main__ import main

EXAMPLES = ROOT / "examples"


def needs(*programs):
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no {' and no '.join(missing)} here")


def succeeds(*command, **keywords):
    done = run(*command, **keywords)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_library
def test_config(capsys):
    def config(*flags):
        assert main(["config", *flags]) == 0
        return capsys.readouterr().out.strip()

    assert config("--version") == fastnorm.__version__
    assert config("--cflags") == f"-I{fastnorm.get_include()}"
    assert config() == f"{config('--cflags')} {config('--libs')}"
    assert config("--version", "--cflags").startswith(fastnorm.__version__)
    assert Path(config("--cmakedir"), "fastnormConfig.cmake").exists()
    assert Path(config("--pkgconfigdir"), "fastnorm.pc").exists()


@needs_cc
@needs_library
@needs("pkg-config")
def test_c_with_pkg_config(tmp_path):
    from fastnorm.install import get_pkgconfig_dir

    environment = os.environ | {"PKG_CONFIG_PATH": get_pkgconfig_dir()}
    assert succeeds("pkg-config", "--modversion", "fastnorm", env=environment).strip() == (
        fastnorm.__version__
    )
    flags = succeeds("pkg-config", "--cflags", "--libs", "fastnorm", env=environment).split()
    program = tmp_path / "embed"
    succeeds(CC, "-std=c99", *STRICT, EXAMPLES / "embed.c", *flags, "-lm", "-o", program)
    succeeds(program, env={"PATH": ""}, cwd="/")


def build_with_cmake(folder, config_dir):
    succeeds(
        "cmake", "-S", EXAMPLES / "resnet_block", "-B", folder, f"-Dfastnorm_DIR={config_dir}"
    )
    succeeds("cmake", "--build", folder)
    return succeeds(folder / "resnet_block", env={"PATH": ""}, cwd="/")


@needs_library
@needs("cmake", "g++", "make")
def test_cpp_with_cmake_and_a_thread_pool(tmp_path):
    from fastnorm.install import get_cmake_dir

    assert "off by at most" in build_with_cmake(tmp_path, get_cmake_dir())


@needs_library
def test_ctypes_without_the_package():
    # -I -S: no site-packages, so that fastnorm cannot be imported.
    command = [sys.executable, "-I", "-S", EXAMPLES / "embed_ctypes.py", fastnorm.get_library()]
    assert "its result 1.0000" in succeeds(*command)


@needs_library
@needs("rustc")
def test_rust(tmp_path):
    folder = Path(fastnorm.get_library()).parent
    program = tmp_path / "embed"
    succeeds(
        "rustc", EXAMPLES / "embed.rs", "-L", folder, "-C", f"link-arg=-Wl,-rpath,{folder}", "-o",
        program,
    )
    assert "multiple of groups" in succeeds(program)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """The C library alone, of one level, built without OpenMP and moved after its installation."""
    if CC is None or not (ROOT / "setup.py").exists():
        pytest.skip("no C compiler or no source here")
    pytest.importorskip("Cython")
    folder = tmp_path_factory.mktemp("c")
    succeeds(
        sys.executable, "setup.py", "-q", "install_c", f"--prefix={folder / 'first'}",
        f"--build-temp={folder / 'objects'}", cwd=ROOT,
        env=os.environ | {
            "FASTNORM_OPENMP": "0", "FASTNORM_LEVELS": "0",
            "FASTNORM_CFLAGS": "-O1 -DFASTNORM_CREATE_BYTES=196608",  # threads for small calls too
        },
    )
    return (folder / "first").rename(folder / "moved")


def test_prefix_holds_what_a_c_library_has(prefix):
    version = fastnorm.__version__
    soname = f"libfastnorm.so.{'.'.join(version.split('.')[: 2 if version[0] == '0' else 1])}"
    library = prefix / "lib" / "libfastnorm.so"
    assert library.resolve().name == f"libfastnorm.so.{version}"
    assert (prefix / "lib" / soname).resolve() == library.resolve()
    assert soname in run("readelf", "-d", library).stdout
    assert (prefix / "include" / "fastnorm.h").exists()
    undefined = succeeds("nm", "--undefined-only", prefix / "lib" / "libfastnorm.a")
    assert " malloc" in undefined
    assert not re.search(r"Py|GOMP|omp_", undefined)
    defined = succeeds("nm", "-g", "--defined-only", prefix / "lib" / "libfastnorm.a")
    assert set(re.findall(r" T (\w+)", defined)) == set(
        re.findall(r"fastnorm_\w+", (ROOT / "fastnorm/kernels/libfastnorm.map").read_text())
    )


@pytest.mark.parametrize("kind", ["shared", "static"])
def test_without_openmp_every_c_test_passes(prefix, kind, tmp_path):
    folder = prefix / "lib"
    library = [folder / "libfastnorm.a"] if kind == "static" else [
        folder / "libfastnorm.so", f"-Wl,-rpath,{folder}"
    ]
    tests = (ROOT / "tests" / name for name in ("test_library.c", "test_attack.c"))
    for source in (EXAMPLES / "embed.c", *tests):
        program = tmp_path / source.stem
        succeeds(
            CC, "-std=c99", *STRICT, source, f"-I{prefix / 'include'}", *library, "-lm",
            "-lpthread", "-o", program,
        )
        succeeds(program, env={"PATH": ""}, cwd="/")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The archive of sources unpacked, and built of all levels without OpenMP."""
    if CC is None or not (ROOT / "setup.py").exists():
        pytest.skip("no C compiler or no source here")
    pytest.importorskip("Cython")
    place = tmp_path_factory.mktemp("sources")
    succeeds(sys.executable, "setup.py", "-q", "dist_c", f"--dist-dir={place}", cwd=ROOT)
    (archive,) = place.glob("fastnorm-c-*.tar.gz")
    with tarfile.open(archive) as packed:
        # Filters came with Python 3.11.4, and 3.12 warns where there is none.
        packed.extractall(place, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    folder = place / archive.name.removesuffix(".tar.gz")
    assert "0 failed" in succeeds(*make(folder), "check", cwd=folder, env=without_python())
    return folder


def make(folder):
    return "make", "-j2", "OPENMP=", "CFLAGS=-O1", f"PREFIX={folder.parent / 'prefix'}"


def without_python():
    return {"PATH": os.environ["PATH"]}


@needs("make", "objcopy")
def test_sources_build_where_there_is_no_python(sources, tmp_path):
    for file in (sources / "src").iterdir():
        assert not re.search(r"\bPy[A-Z_]|Python\.h|__pyx_m", file.read_text()), file.name
    succeeds(*make(sources), "install", cwd=sources, env=without_python())
    prefix, program = sources.parent / "prefix", tmp_path / "embed"
    succeeds(
        CC, "-std=c99", *STRICT, EXAMPLES / "embed.c", f"-I{prefix / 'include'}",
        prefix / "lib/libfastnorm.a", "-lm", "-lpthread", "-o", program,
    )
    succeeds(program)
    assert "gomp" not in (prefix / "lib/pkgconfig/fastnorm.pc").read_text()


@needs("doxygen")
def test_manual_of_the_header(tmp_path):
    """Without a warning, and with every public name."""
    settings = (ROOT / "docs" / "Doxyfile").read_text() + f"OUTPUT_DIRECTORY = {tmp_path}\n"
    succeeds("doxygen", "-", cwd=ROOT, input=settings)
    page = (tmp_path / "html" / "fastnorm_8h.html").read_text()
    for name in re.findall(
        r"fastnorm_\w+", (ROOT / "fastnorm/kernels/libfastnorm.map").read_text()
    ):
        assert f">{name}</a>" in page, name


@needs("pkg-config")
def test_a_moved_prefix_is_found_by_pkg_config(prefix, tmp_path):
    environment = os.environ | {"PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
    flags = succeeds("pkg-config", "--cflags", "--libs", "fastnorm", env=environment).split()
    assert "-rpath" not in " ".join(flags)
    program = tmp_path / "embed"
    succeeds(CC, "-std=c99", *STRICT, EXAMPLES / "embed.c", *flags, "-lm", "-o", program)
    succeeds(program, env={"PATH": "", "LD_LIBRARY_PATH": str(prefix / "lib")})


@needs("cmake", "g++", "make")
def test_a_moved_prefix_is_found_by_cmake(prefix, tmp_path):
    assert "off by at most" in build_with_cmake(tmp_path, prefix / "lib" / "cmake" / "fastnorm")


@needs("make", "objcopy", "objdump")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="levels of x86-64")
def test_baseline_objects_need_no_avx(sources):
    objects = sorted((sources / "objects").glob("*.o"))
    baseline = [file for file in objects if "_v3" not in file.name and "_v4" not in file.name]
    assert len(baseline) >= 4 + 3 * 4
    for file in baseline:
        assembly = succeeds("objdump", "-d", "--no-show-raw-insn", file)
        assert re.search(r"\tmul[ps][sd]\s", assembly) or ".c.o" in file.name
        found = re.search(r"^.*(?:%[yz]mm|\tv(?:mov|add|mul|sub)[a-z]*\s).*$", assembly, re.M)
        assert found is None, (file.name, found and found[0])


@needs_cc
@needs("patchelf")
def test_a_repaired_wheel(tmp_path):
    """It is tagged manylinux, carries what it needs, and its library keeps its name."""
    pytest.importorskip("auditwheel")
    pytest.importorskip("Cython")
    source, made, site = (tmp_path / name for name in ("source", "made", "site"))
    unwanted = shutil.ignore_patterns(".git", "build", "dist", "lib", "*.so", "*.egg-info", ".venv")
    shutil.copytree(ROOT, source, ignore=unwanted)
    python = (sys.executable, "-m")
    succeeds(
        *python, "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source,
        env=os.environ
        | {"FASTNORM_NATIVE": "require", "FASTNORM_CFLAGS": "-O1", "FASTNORM_LEVELS": "0"},
    )
    succeeds(*python, "auditwheel", "repair", "-w", made, next(tmp_path.glob("*.whl")))
    wheel = next(made.glob("*.whl"))
    assert "-manylinux" in wheel.name
    shutil.unpack_archive(wheel, site, "zip")
    library = site / "fastnorm" / "lib" / "libfastnorm.so"
    if "libgomp" in succeeds("readelf", "-d", library):
        assert list((site / "fastnorm.libs").glob("libgomp*"))
    code = (
        "import fastnorm, numpy; fastnorm.explain(); print(fastnorm.get_library());"
        "fastnorm.layer_norm(numpy.ones((1000, 1000)), 1000, backend='native')"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    said = succeeds(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    assert "native     chosen" in said
    assert str(library) in said
