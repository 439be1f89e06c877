"""A Python with the version of megatron-core that this one does not have; the rest of its packages are this one's.

python -m tests.support.other_core prints its path. The wheel may be of another version of Python: no code of this project uses
what is compiled in it.
"""

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("0.16.1", "0.19.2")


def other_core() -> Path:
    """Its interpreter; the first call makes the environment, in the cache of downloaded material."""
    version = next(version for version in VERSIONS if version != importlib.metadata.version("megatron-core"))
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder = ROOT / ".cache" / f"megatron-core-{version}-{name}"
    finished = folder / "finished"
    if not finished.exists() or finished.read_text() != sys.prefix:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=False, symlinks=True)
        packages = folder / "lib" / name / "site-packages"
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        download += ["--python-version", "3.12", "--dest", str(folder / "wheel"), f"megatron-core=={version}"]
        subprocess.run(download, check=True)
        (wheel,) = (folder / "wheel").iterdir()
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
        (packages / "base.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        finished.write_text(sys.prefix)
    return folder / "bin" / "python"


if __name__ == "__main__":
    print(other_core())
