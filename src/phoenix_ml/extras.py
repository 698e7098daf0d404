"""Which libraries the optional parts take.

They are named by themselves: on PyPI, ``phoenix-ml`` is somebody else's package.
"""

from typing import Final

# As the extras of pyproject.toml have them; a test compares the two.
LIBRARIES: Final = {
    "redis": ("redis", "hiredis"),
    "postgres": ("psycopg[binary]",),
    "kafka": ("confluent-kafka",),
    "alerts": ("apprise",),
    "grpc": ("grpcio", "grpcio-health-checking", "grpcio-reflection"),
    "convert": ("scikit-learn", "skl2onnx", "onnxmltools"),
    "mlflow": ("mlflow-skinny",),
}


def install(extra: str) -> str:
    """The command that installs an extra's libraries, wherever it is typed.

    >>> install("redis"), install("postgres")
    ('pip install redis hiredis', "pip install 'psycopg[binary]'")
    """
    return " ".join(["pip install", *(f"'{name}'" if "[" in name else name for name in LIBRARIES[extra])])
