"""Sqlite: the one SQLite with which this process opens ledgers: that of pysqlite3 where it is installed and newer than
Python's, which is the system's as a rule and years old.

In: what is installed.  Out: `sqlite3`, a module with the names of the standard library's.

Two SQLite libraries in one process must not open the same file: a process loses its POSIX locks on a file when it
closes any descriptor of it, and each library knows its own alone. So whoever opens a ledger's file takes this module.
"""

import sqlite3 as of_python
from types import ModuleType

try:
    import pysqlite3 as of_package
except ImportError:  # no wheel for this machine: the extras leave it out there
    of_package = of_python


def newest(*modules: ModuleType) -> ModuleType:
    """The first with the newest library: pysqlite3 may have been built against the system's."""
    return max(modules, key=lambda module: module.sqlite_version_info)


sqlite3 = newest(of_python, of_package)
