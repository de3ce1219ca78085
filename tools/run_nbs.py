"""Run notebooks in place and keep their outputs: `python tools/run_nbs.py nbs/*.ipynb`.

Cells flagged `#| eval: false` (or with a test flag of settings.ini) are left as they are; the
result is cleaned as `nbdev_clean` does it, so two runs give the same bytes.
"""
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from execnb.nbio import read_nb, write_nb
from nbclient import NotebookClient
from nbdev.clean import clean_nb
from nbdev.config import get_config

SKIP = re.compile(r"^\s*#\|\s*(eval:\s*false|%s)\s*$" % "|".join(get_config().tst_flags.split()), re.M)


class Runner(NotebookClient):
    "nbclient, but cells that tests skip are skipped here too"

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type == "code" and SKIP.search(cell.source):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def run(path):
    nb = nbformat.read(path, as_version=4)
    Runner(nb, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True,
           resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(nb, path)
    nb = read_nb(path)
    clean_nb(nb, allowed_cell_metadata_keys=["tags"])
    write_nb(nb, path)


for path in map(Path, sys.argv[1:]):
    start = time.time()
    run(path)
    print(f"{path}: {time.time() - start:.0f} s, {os.path.getsize(path) // 1024} KB", flush=True)
