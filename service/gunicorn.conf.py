"""Gunicorn's settings: one worker process with threads, because one process owns the cores.

In: service.config.  Out: the names that gunicorn reads. No preload: threads do not survive a fork.
"""

import os
import signal

from service.config import Settings

_settings = Settings.from_env()

_host = f"[{_settings.host}]" if ":" in _settings.host else _settings.host
bind = f"{_host}:{_settings.port}"
# Threads, and a loop that gathers requests and refuses those for which there is no room.
worker_class = "service.worker.Worker"
workers = 1
threads = _settings.threads
# Longer than a client pauses between two requests: its pool would otherwise send into a closed connection.
keepalive = 75
# For this kind of worker a heartbeat, not a limit on requests, which have deadlines of their own.
timeout = 120
graceful_timeout = _settings.grace_s
limit_request_line = 4094
# No proxy names the application's place: whoever could, would get a 500 for a place that is not there.
forwarder_headers = ""
limit_request_fields = 100
limit_request_field_size = 8190
control_socket_disable = True
# The kernel would wait for a slow reader for as long as that likes, and with it the thread.
sendfile = False
# The heartbeat is a file; on a slow or read-only disk it would block the worker.
if os.path.isdir("/dev/shm"):
    worker_tmp_dir = "/dev/shm"


def post_worker_init(worker):
    """A GPU that failed works in a new process only: this one finishes what it has, gunicorn starts another."""
    worker.wsgi.extensions["cconv"].when_lost(lambda: os.kill(worker.pid, signal.SIGTERM))


accesslog = _settings.access_log or None
errorlog = _settings.error_log
proc_name = "cconv"
