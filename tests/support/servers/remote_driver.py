"""Fills a remote store in processes that test_remote_store.py kills; `remote_driver.py URL`.

For every line on stdin a child begins or continues the store, and its pid is printed; once it has
ended, its wait status is. Children are forked, so that each starts in no time.
"""

from __future__ import annotations

import os
import sys

from featstore import Partition, StoreSchema
from featstore.opening import writer_of
from featstore.remote.writer import RemoteStoreWriter
from tests.support.stores.sample_stores import init_store_at, make_partition

SCHEMA = StoreSchema(tars=3, capacity=6, views=1, frames=4, dim=16, chunk_rows=2)
ROWS = (6, 5, 1)


def partition(tar: int) -> Partition:
    return make_partition(SCHEMA, tar, ROWS[tar], failed=[0])


def fill(url: str) -> None:
    writer = writer_of(url) or init_store_at(url, SCHEMA, ROWS)
    assert isinstance(writer, RemoteStoreWriter)
    pending = writer.pending()
    with writer.claim(pending):
        for tar in pending:
            writer.write_partition(tar, partition(tar))
    assert writer.pending() == []
    writer.close()


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # nothing here is a power cut
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                fill(sys.argv[1])
            except BaseException as error:
                print(f"child: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)
