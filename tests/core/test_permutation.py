from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.core import oracle

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc"


def test_the_permutation_of_the_core_is_a_bijection_with_the_right_inverse() -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler (set CXX)")
    subprocess.run(
        [
            compiler,
            "-std=c++20",
            "-fsyntax-only",
            "-fconstexpr-ops-limit=100000000"
            if "clang" not in Path(compiler).name
            else "-fconstexpr-steps=100000000",
            f"-I{SOURCES}",
            str(HERE / "permutation_test.cpp"),
        ],
        check=True,
    )


def test_the_permutation_sends_every_value_everywhere_about_as_often() -> None:
    size, num_keys = 37, 4000
    images = np.array(
        [oracle.permutation(size, oracle.random_key(1, 1, key)) for key in range(num_keys)]
    )
    counts = np.stack([np.bincount(images[:, value], minlength=size) for value in range(size)])
    expected = num_keys / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # (size - 1)^2 degrees of freedom: mean 1296, standard deviation 51.
    assert chi_square < 1296 + 5 * 51
