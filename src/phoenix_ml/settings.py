"""Every setting, typed and documented: from flags, else the environment, else ``phoenix.toml``."""

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from phoenix_ml.domain.errors import Misconfigured

_MIB = 1024 * 1024
_FILE = Path("phoenix.toml")
# Of the folders in DATA that hold an upload while it is registered.
UPLOAD_PREFIX = "upload-"
ROLES = ("ship", "log", "monitor", "alert", "heal")


def parse_roles(text: str) -> tuple[str, ...]:
    """The roles that are named, separated by commas, or by ``all`` or ``none``. Raises ValueError.

    >>> parse_roles("log, monitor"), parse_roles("none")
    (('log', 'monitor'), ())
    """
    if text in ("all", "none"):
        return ROLES if text == "all" else ()
    named = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    if not set(named) <= set(ROLES):
        raise ValueError(
            f"{text!r}: write all, none, or one or more of {', '.join(ROLES)} with commas between, such as log,monitor"
        )
    return named


class Settings(BaseSettings):
    """``PHOENIX_<NAME>`` in the environment sets the field of that name."""

    model_config = SettingsConfigDict(env_prefix="PHOENIX_", toml_file=_FILE, extra="forbid", frozen=True)

    data: Path = Field(Path("phoenix-data"), description="Folder of all that is stored locally.")
    database: str = Field("", description="`sqlite:///FILE` or `postgresql://…`; empty is `DATA/phoenix.db`.")
    features: str = Field(
        "sqlite:",
        description="Feature store: `sqlite:` (`DATA/features.db`), `sqlite:FILE`, `redis://…`, `redis+sentinel://…` or `redis+cluster://…`.",
    )
    events: str = Field(
        "local:",
        description="The road from the journal to the log: `local:`, or `kafka://HOST:PORT,…/PREFIX?PROPERTY=VALUE`.",
    )
    kafka_partitions: int = Field(
        6,
        ge=1,
        le=1000,
        description="Partitions of `inference-events` when Phoenix creates it: the most log workers that share the load.",
    )
    artifacts: str = Field(
        "file:", description="Artifact store: `file:` (`DATA/artifacts`) or `file:FOLDER`."
    )

    host: str = Field("127.0.0.1", description="Address to listen on; any but a loopback needs `insecure`.")
    grpc_port: int = Field(
        -1,
        ge=-1,
        le=65535,
        description="TCP port of gRPC (extra `grpc`); 0 takes a free one, -1 serves no gRPC.",
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes a free one.")
    workers: int = Field(1, ge=1, le=256, description="API processes.")
    roles: str = Field(
        "all",
        description="What the background process of `serve` does, separated by commas: `ship` the journals to Kafka, write the `log`, `monitor` the models, `alert` people, `heal` models; or `all`, or `none` to start none.",
    )
    insecure: bool = Field(False, description="Listen on an address that others reach, without keys.")

    allowed_hosts: str = Field(
        "",
        description="Host names, separated by commas, that requests may name besides `localhost`; empty: on a loopback address no others, else any.",
    )

    body_limit_bytes: int = Field(10 * _MIB, ge=1024, description="Largest JSON body.")
    tensor_body_limit_bytes: int = Field(
        64 * _MIB,
        ge=1024,
        description="Largest body of `POST /v2/models/…/infer`, and largest message over gRPC.",
    )
    tensor_record_limit_bytes: int = Field(
        16 * 1024,
        ge=0,
        description="Largest tensor that is put on record whole; of a larger one the log has shape and SHA-256.",
    )
    upload_limit_bytes: int = Field(2048 * _MIB, ge=1024, description="Largest body of `POST /models`.")
    upload_limit_s: float = Field(
        600.0,
        gt=0,
        description="Longest time that an uploaded model may take to be loaded, run and described.",
    )
    upload_memory_mib: int = Field(
        8192,
        ge=2048,
        description="Most memory that an uploaded model may take meanwhile, with its reference.",
    )
    batch_limit: int = Field(1000, ge=1, description="Most instances or outcomes in one request.")
    keep_alive_s: int = Field(75, ge=1, description="How long an idle connection is kept open.")
    stop_timeout_s: int = Field(30, ge=1, description="How long a stop waits for requests in flight.")

    features_deadline_ms: float = Field(
        5.0, gt=0, description="Longest wait for one read of the Redis store."
    )
    features_cache_ms: float = Field(
        0.0,
        ge=0,
        description="How long an API process may use what it has read of an entity's features; 0 asks the store each time.",
    )
    features_cache_entities: int = Field(
        10_000, ge=1, description="Most entities in one process's feature cache; the oldest go."
    )
    registry_poll_ms: int = Field(
        250, ge=10, le=1000, description="How often API processes look for registry changes."
    )
    engine_threads: int = Field(
        1, ge=0, description="Threads of one engine run, at most the container's CPU limit; 0 is that limit."
    )

    device: str = Field(
        "auto",
        description="Where models run: `cpu`, `cuda`, `cuda:1` (the second GPU), or `auto`, a GPU where there is one.",
    )
    gpu_memory_mib: int = Field(
        0, ge=0, description="Most GPU memory that one version's session may take; 0 is no limit."
    )

    queue_limit: int = Field(
        256, ge=1, description="Most requests that wait for one version in one process; more are refused."
    )
    queue_deadline_ms: int = Field(
        2000, ge=1, description="Longest wait for a run of a slow version; later requests are refused."
    )

    journal_limit_bytes: int = Field(
        1024 * _MIB, ge=64 * 1024, description="Most that one API process keeps in its journal."
    )
    journal_segment_bytes: int = Field(
        8 * _MIB, ge=4096, le=64 * _MIB, description="Size at which a journal segment is closed."
    )
    journal_full: Literal["refuse", "drop"] = Field(
        "refuse",
        description="When the journal is full: answer 503, or answer and count what is not on record.",
    )
    journal_sync_ms: int = Field(
        1000, ge=10, description="How often the journal is forced to disk: the most that power loss can take."
    )

    drift_policy: Literal["designed", "classic"] = Field(
        "designed",
        description="What opens a drift incident: the `designed` alarm with its error budget, or the `classic` p < 0.05 on any feature.",
    )
    alerts_group_s: int = Field(
        300,
        ge=0,
        description="Least time between two alerts of one model; what comes within it waits for the next.",
    )

    alerts: str = Field(
        "log:",
        description="Who hears of alerts, separated by spaces: `log:`, `webhook+https://…`, or `apprise+` before a URL of Apprise; Kafka hears where it is used.",
    )
    alerts_secret: str = Field(
        "", description="What webhooks are signed with, in base64; empty: they are not signed."
    )
    alerts_give_up_h: float = Field(
        24.0, gt=0, description="How long an alert is tried again on a channel that does not take it."
    )
    alerts_a_minute: int = Field(
        30,
        ge=1,
        description="Most messages to one channel in a minute, from each process with the role `alert`; the others wait.",
    )

    trainer: str = Field(
        "",
        description="What trains a model again: `process:COMMAND`, or a system outside: `webhook:`, `airflow:`, `kubeflow:` or `github:`; empty: requests wait.",
    )
    trainer_token: str = Field(
        "",
        repr=False,
        description="What a trainer outside takes us by; of `webhook:`, what requests are signed with.",
    )
    trainer_limit_s: float = Field(
        3600.0, gt=0, description="Longest time that a training may take, and the check of what it has made."
    )
    trainer_memory_mib: int = Field(
        0,
        ge=0,
        description="Most memory that a process of the trainer may take; 0 sets no limit. The check of what it has made gets as much, 2048 at least, and 8192 with 0.",
    )
    trainer_days: float = Field(
        90.0, gt=0, description="How far back the predictions go that a trainer gets."
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    log_format: Literal["json", "text"] = Field("json", description="One JSON object a line, or plain text.")

    @field_validator("data", "host", mode="before")
    @classmethod
    def _is_named(cls, value: Any) -> Any:
        # An empty folder would be the current one, and an empty host any.
        if value == "":
            raise ValueError("it is empty; leave it out for the default")
        return value

    @field_validator("roles")
    @classmethod
    def _are_roles(cls, value: str) -> str:
        parse_roles(value)
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{(self.data / 'phoenix.db').absolute()}"

    @property
    def journal_folder(self) -> Path:
        return self.data / "journal"

    @property
    def dead_letters_file(self) -> Path:
        return self.data / "dead" / "inference-events.dead.jsonl"

    @property
    def background_roles(self) -> tuple[str, ...]:
        """The roles of the background process; none means that there is no such process."""
        roles = parse_roles(self.roles)
        if self.roles == "all" and self.events.startswith("local:"):  # there is nowhere to ship
            return tuple(role for role in roles if role != "ship")
        return roles

    @property
    def run_folder(self) -> Path:
        """Locks and metrics of the processes that run now."""
        return self.data / "run"

    @property
    def metrics_folder(self) -> Path:
        return self.run_folder / "metrics"

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def environment(self) -> dict[str, str]:
        """The environment that gives another process the same settings."""
        return {f"PHOENIX_{name.upper()}": str(value) for name, value in self.model_dump().items()}


def load_settings(**flags: Any) -> Settings:
    """The settings; flags that are None count as not given. Raises Misconfigured, naming each that is wrong."""
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as exc:
        raise Misconfigured("; ".join(_problem(error) for error in exc.errors())) from exc
    except tomllib.TOMLDecodeError as exc:
        raise Misconfigured(f"{_FILE.absolute()} is not TOML: {exc}") from exc
    except UnicodeDecodeError as exc:
        line = exc.object.count(b"\n", 0, exc.start) + 1
        raise Misconfigured(f"{_FILE.absolute()}, line {line}, is not UTF-8: {exc.reason}") from exc
    except OSError as exc:
        raise Misconfigured(f"{_FILE.absolute()} cannot be read: {exc.strerror}") from exc


def fixed_settings(**values: Any) -> Settings:
    """The defaults with these values, whatever the environment and ``phoenix.toml`` say."""
    return _FixedSettings(**values)


def misspelt_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that are no settings but look like one, each with the setting that may be meant.

    Others with the prefix are left alone: they may be another program's.

    >>> misspelt_variables({"PHOENIX_WORKRES": "2", "PHOENIX_WORKERS": "2", "PHOENIX_HOME": "/"})
    {'PHOENIX_WORKRES': 'PHOENIX_WORKERS'}
    """
    known = [f"PHOENIX_{name.upper()}" for name in Settings.model_fields]
    found = {}
    for name in environment:
        if name.upper().startswith("PHOENIX_") and name.upper() not in known:
            for near in get_close_matches(name.upper(), known, 1, 0.85):
                found[name] = near
    return found


class _FixedSettings(Settings):
    model_config = SettingsConfigDict(toml_file=None)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def _problem(error: ErrorDetails) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"PHOENIX_{name.upper()}: {error['msg'].removeprefix('Value error, ')}"
    # Only the file can name one: of the environment no others are read, and flags are ours.
    near = get_close_matches(name.lower().removeprefix("phoenix_"), Settings.model_fields)
    advice = f"did you mean {' or '.join(near)}?" if near else "remove it, or comment it out"
    return f"{_FILE.absolute()}: {name!r} is not a setting; {advice}"
