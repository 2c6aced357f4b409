"""The native library as built for this machine, for one without its AMX, and for one without AVX-512 or VNNI."""

import pytest

from engines.kernels.native import NATIVE, NativeLibrary, cpu_features, open_library
from tests.conftest import REPOSITORY

BUILDS = {
    "native": (NATIVE,),
    "vectors": (NATIVE, "-mno-amx-bf16"),
    "avx2": ("-march=x86-64-v3",),
}


@pytest.fixture(scope="session", params=BUILDS)
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    """Two threads, whatever the machine has: phases are really shared."""
    if not cpu_features() >= {"avx2", "fma"}:
        pytest.skip("the native library needs AVX2")
    if request.param == "vectors" and "amx_bf16" not in cpu_features():
        pytest.skip("the native build is this one")
    folder = REPOSITORY / ".cache" / "native"
    return open_library(folder, flags=BUILDS[request.param], num_threads=2)
