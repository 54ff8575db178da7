"""The service: cconv over HTTP. An application, run from a checkout or the image and never installed.

    errors account config wire metrics -> repository -> engine ledger -> auth admission -> lanes pace -> scheduler
        -> pipeline -> routes -> factory; door connection -> worker, which is gunicorn's

In: Settings.  Out: a WSGI application, `gunicorn -c service/gunicorn.conf.py 'service:create_app()'`.
"""


def create_app(settings=None):
    """The Flask application, with the environment's settings unless given (service.config.Settings)."""
    # Imported here because gunicorn's master, which reads service.config, must load neither Flask nor the engine.
    from .factory import build

    return build(settings)
