"""These tests want the Keras backend of KERAS_BACKEND: test_backends.py runs them, once for each."""

import os

collect_ignore_glob = [] if os.environ.get("DASK_SERIALIZERS_ZOO") else ["test_*.py"]
