"""No form of a password, key or token passes; what is no secret stays as it is."""

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import WorkflowConfig
from pipelines.ladder.config import LadderConfig
from repfusion.config import known_keys
from repfusion.display.redaction import HIDDEN, RedactingFormatter, has_raw_password, is_secret_name, redact
from repfusion.evaluation.record import EvaluationConfig
from repfusion.model.config import ModelConfig
from repfusion.train import TrainConfig

ROOT = Path(__file__).resolve().parents[3]
SECRET = "Zq7secretXk"

TEXTS = [
    f"postgresql://me:{SECRET}@host:5432/db",
    f"postgresql://me:a@{SECRET}@host/db",
    f"postgresql://me:a/{SECRET}@host/db",
    f"postgresql://me:{SECRET}/1@host/db",
    f"postgresql://me:12/{SECRET}@host/db",
    f"postgresql://me:a?{SECRET}#b@host/db",
    f"postgresql://me:a b {SECRET}@host/db",
    f"postgresql://host/db?user=me&password={SECRET}",
    f"postgresql:///db?host=/tmp&password={SECRET}",
    f"https://host/list.csv?api_key={SECRET}&page=2",
    f"https://host/list.csv?page=2;Access-Token={SECRET}",
    f"https://host/list.csv#access_token={SECRET}",
    f"https://account.blob.core.windows.net/c/l.csv?sv=2024&sig={SECRET}%3D&se=2030",
    f"https://bucket.s3.amazonaws.com/l.csv?X-Amz-Credential={SECRET}&X-Amz-Expires=60",
    f"https://bucket.s3.amazonaws.com/l.csv?X-Amz-Signature={SECRET}",
    f"https://storage.googleapis.com/b/l.csv?key={SECRET}",
    f"https://{SECRET}@github.com/us/repository",
    f"s3://AKIA123:{SECRET}@bucket/data",
    f"mysql+pymysql://me:{SECRET}@[::1]:3306/db",
    f"mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3D{SECRET}",
    f"host=h port=5432 user=me password={SECRET} dbname=d",
    f"host=h password='a {SECRET}' dbname=d",
    f"Server=h;Uid=me;Pwd={SECRET};",
    f"Driver=x;PWD={{a b;{SECRET}}};UID=me",
    f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={SECRET}==;EndpointSuffix=x",
    f"export AWS_SECRET_ACCESS_KEY={SECRET}",
    f"--password={SECRET}",
    f"_PASSWORD = {SECRET}",
    f"trainings.train.tracking.password={SECRET}",
    f"storage_options.key={SECRET}",
    f"Authorization: Bearer {SECRET}",
    f"authorization: Basic {SECRET}",
    f"{{'Authorization': 'Bearer {SECRET}'}}",
    f"sent the header Bearer {SECRET} to it",
    f"options {{'key': 'a', 'secret': '{SECRET}', 'anon': False}}",
    f'{{"client_secret": "{SECRET}"}}',
    f"storage_options:\n  secret: {SECRET}\n  anon: false",
    f"storage_options: {{token: {SECRET}, anon: false}}",
    f"could not connect (postgresql://me:{SECRET}@host/db): timeout",
    f"FileNotFoundError: https://host/l.csv?token={SECRET}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_no_form_of_a_secret_passes(text):
    shown = redact(text)
    assert SECRET not in shown and HIDDEN in shown
    assert redact(shown) == shown


VALUES = [
    {"storage_options": {"key": SECRET}},
    {"storage_options": {"client_kwargs": {"aws_secret_access_key": SECRET, "region": "eu"}}},
    {"passwords": [SECRET, SECRET]},
    {"token": {"refresh": SECRET}},
    {"SecretAccessKey": SECRET},
    {"x-api-key": SECRET},
    {"connection_string": f"AccountName=a;{SECRET}"},
    {"pwd": 12345678, "other": HIDDEN},
    {"addresses": [f"postgresql://me:it's {SECRET}@host/db"]},
    {"addresses": (f"postgresql://me:{SECRET}: x@host/db",)},
    {"headers": [f"Authorization: Bearer {SECRET}"]},
    {"dsn": f"host=h password={SECRET}"},
    {"token": f"${{oc.env:TOKEN,{SECRET}}}"},
    {"uri": f"postgresql://me:${{oc.env:PASSWORD,{SECRET}}}@host/db"},
]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_nor_below_a_key_or_in_a_list(value):
    shown = redact(value)
    assert SECRET not in str(shown) and "12345678" not in str(shown) and HIDDEN in str(shown)
    assert redact(shown) == shown and shown.keys() == value.keys()


@pytest.mark.parametrize(
    "value",
    [
        {"token": "${oc.env:TOKEN}", "Authorization": "Bearer ${oc.env:TOKEN}", "key": "${a.b}${c}"},
        *("postgresql://me:${oc.env:PASSWORD}@host/db", "host=h password=${oc.env:PASSWORD} dbname=d"),
        *(
            "https://host/?token=${oc.env:TOKEN}",
            "sqlite:///runs/mlflow.db",
            "http://127.0.0.1:5000",
            "postgresql://me@host/db",
        ),
        *("postgresql://postgres@/db?host=/tmp/x", "s3://bucket/a@b", "https://host:8080/img@2x.png?w=3"),
        *("shard 00042.tar, key 000421337: latents are (768, 16)", "expected key.path=value", "a: b"),
        *("unknown key 'tower.siez'; did you mean 'tower.size'?", "unexpected token: x", "no token"),
        *("trainings.train.tracking.token: Input should be a valid string", "12:00 me@host wrote"),
        {
            "num_tokens": 3,
            "max_tokens": 4,
            "bos_token": "<s>",
            "key_frames": 3,
            "password": None,
            "token": "",
        },
        {
            "key_frames": 3,
            "secret": False,
            "lr": 1e-3,
            "passes": [1, 2],
            "monkey": "x",
            "author": "me",
            "signed": "x",
        },
    ],
)
def test_what_is_no_secret_stays(value):
    assert redact(value) == value


def test_no_field_of_ours_is_taken_for_a_secret():
    kinds = (WorkflowConfig, TrainConfig, ModelConfig, EvaluationConfig, LadderConfig)
    assert not {key for kind in kinds for key in known_keys(kind) if is_secret_name(key)}


PASSWORD = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=20)


@settings(deadline=None)
@given(PASSWORD)
def test_any_password_of_an_address_is_hidden_as_a_value(password):
    assert redact({"uri": f"postgresql://me:{password}@host/db"}) == {"uri": "postgresql://me:***@host/db"}


@settings(deadline=None)
@given(PASSWORD.filter(lambda text: not any(map(str.isspace, text))))
def test_any_password_without_spaces_is_hidden_in_a_text(password):
    shown = redact(f"no answer from postgresql://me:{password}@host/db: timeout")
    assert shown == "no answer from postgresql://me:***@host/db: timeout"


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read_and_what_was_redacted_stays(text):
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "part", ["a", "a.", "a=", "a:", "'a", "a://", "a://b:", "{a: ", " ", "@", "&a=b", "\n"]
)
def test_long_texts_are_read_in_a_moment(part):
    start = time.perf_counter()
    redact(part * (300_000 // len(part)))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("address", "is_raw"),
    [
        ("postgresql://me:p%40s%2Fs@host/db", False),
        ("postgresql://me:pass@host/db?host=/tmp", False),
        ("postgresql://postgres@/db?host=/tmp/a", False),
        ("sqlite:///a@b:c/d@e.db", False),
        ("http://host:5000", False),
        ("postgresql://me:p@ss@host/db", True),
        ("postgresql://me:p/ss@host/db", True),
        ("postgresql://me:p ss@host/db", True),
        ("postgresql://me:p?s#s@host/db", True),
    ],
)
def test_passwords_that_nobody_encoded_are_known(address, is_raw):
    assert has_raw_password(address) is is_raw


def test_log_lines_and_tracebacks_are_redacted():
    record = logging.makeLogRecord({"msg": "lost %s", "args": (f"postgresql://me:{SECRET}@host/db",)})
    try:
        raise ValueError(f"password={SECRET}")
    except ValueError:
        record.exc_info = sys.exc_info()
    shown = RedactingFormatter("%(message)s").format(record)
    assert SECRET not in shown and "lost postgresql://me:***@host/db" in shown and "Traceback" in shown


def test_what_ends_a_process_or_a_thread_is_shown_without_secrets():
    code = (
        "import threading\n"
        "from repfusion.display.redaction import redact_tracebacks\n"
        "redact_tracebacks()\n"
        "def fail(text):\n"
        "    try:\n"
        "        raise OSError(text)\n"
        "    except OSError as error:\n"
        "        raise ValueError('it failed') from error\n"
        f"thread = threading.Thread(target=fail, args=['https://me:{SECRET}@host'])\n"
        "thread.start(); thread.join()\n"
        f"fail('token={SECRET}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and SECRET not in done.stderr.replace(f"'{SECRET}", "")
    assert "https://me:***@host" in done.stderr and "token=***" in done.stderr
