"""The native library as built for this machine, and for one without AVX-512 or VNNI: the portable paths."""

import pytest

from engines.kernels.native import NATIVE, NativeLibrary, cpu_features, open_library
from tests.conftest import REPOSITORY

BUILDS = {"native": NATIVE, "avx2": "-march=x86-64-v3"}


@pytest.fixture(scope="session", params=BUILDS)
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    """Two threads, whatever the machine has: phases are really shared."""
    if not cpu_features() >= {"avx2", "fma"}:
        pytest.skip("the native library needs AVX2")
    folder = REPOSITORY / ".cache" / "native"
    return open_library(folder, flags=(BUILDS[request.param],), num_threads=2)
