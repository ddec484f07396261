"""Package list only (everything else is in pyproject.toml).

pyproject's `packages.find` cannot place the folder `kernels/` at the import name
`rewriter.kernels`; new `kernels/<op>/` folders with an `__init__.py` are found here.
"""

from setuptools import find_packages, setup

PARTS = ("passes", "kernels", "backends")

packages = ["rewriter"] + [f"rewriter.{name}" for name in find_packages("rewriter")]
for part in PARTS:
    packages += [f"rewriter.{part}"] + [f"rewriter.{part}.{name}" for name in find_packages(part)]

setup(
    packages=packages,
    package_dir={"rewriter": "rewriter"} | {f"rewriter.{part}": part for part in PARTS},
    package_data={"rewriter": ["data/*.txt"]},
)
