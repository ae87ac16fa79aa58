"""The law: how a model is run may change how fast an answer comes, never which answer.

Logits and tokens are the same bytes over thread counts, prefill chunks, instruction sets, and
sessions that take turns. `answers.py` makes the digests, also in processes of their own.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import answers
import numpy as np
import pytest
import tiny
import tiny_gguf
from tiny import MODEL_TYPES
from tiny_families import FAMILIES

import edgemem
from edgemem import converters
from edgemem._native import isa_names
from edgemem.dtypes import KV_TYPES

ISAS = isa_names()
DTYPES = ("keep", "q8_0", "q4_0")


@pytest.fixture(scope="module")
def stores(tmp_path_factory, convert_store, seed_base) -> list[str]:
    """Random models of every type in every kind of format, those of families in one each."""
    folder = tmp_path_factory.mktemp("law")
    made = []
    for i, kind in enumerate(MODEL_TYPES):
        tiny.write(folder / kind, kind, seed_base + 1000 + i)
        dtypes = (DTYPES[i % len(DTYPES)],) if kind in FAMILIES else DTYPES
        made += [str(convert_store(folder / kind, dtype)) for dtype in dtypes]
    return made


@pytest.fixture(scope="module")
def trained(tiny_moe_store, stories_store, shared, convert_store) -> list[str]:
    """Trained models, whose routing and sums are not those of noise."""
    quantised = [convert_store(shared / "models" / "tiny-moe", d) for d in ("q8_0", "q4_0")]
    return [str(path) for path in (stories_store, tiny_moe_store, *quantised)]


def records_of(isa: str, stores: list[str], kv: str) -> list[list]:
    """answers.py's records, from a process in which EDGEMEM_ISA forces the instruction set."""
    script = Path(answers.__file__)
    done = subprocess.run(
        [sys.executable, str(script), kv, *stores], env=os.environ | {"EDGEMEM_ISA": isa},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    assert {record[1] for record in records} == {isa}
    return records


def assert_one_answer_each(stores: list[str], kv: str = "f16") -> dict[str, str]:
    """Returns the digest of each store's answer."""
    records = [record for isa in ISAS for record in records_of(isa, stores, kv)]
    assert len(records) == len(stores) * len(ISAS) * len(answers.WAYS)
    for store in stores:
        mine = [record for record in records if record[0] == store]
        other = [record for record in mine if record[4] != mine[0][4]]
        assert not other, f"{store} answers {mine[0][1:]}, but also {other[0][1:]}"
    return {record[0]: record[4] for record in records}


def test_random_models_have_one_answer(stores):
    assert_one_answer_each(stores)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_blocks_of_a_gguf_have_one_answer(model_type, tmp_path, seed_base):
    """All formats in one model; of a tied one the table too."""
    facts = tiny_gguf.facts(model_type, 0, blocks=256) | {"tied": model_type == "llama"}
    model = tiny.write(tmp_path / "hf", model_type, seed_base, **facts)
    path = tiny_gguf.write(tmp_path / "m.gguf", model, tiny_gguf.of_every_type)
    converters.convert(path, tmp_path / "m.edgemem")
    assert_one_answer_each([str(tmp_path / "m.edgemem")])


def test_trained_models_have_one_answer(trained):
    assert_one_answer_each(trained)


def test_each_type_of_kv_cache_has_one_answer(stores, trained):
    some = [*stores[:: len(DTYPES)], *trained]
    digests = [assert_one_answer_each(some, kv) for kv in KV_TYPES[1:]]
    for store in trained:
        assert len({found[store] for found in digests}) == len(digests), "each has its own"


def test_an_unknown_isa_is_refused(stores):
    done = subprocess.run(
        [sys.executable, answers.__file__, "f16", stores[0]],
        env=os.environ | {"EDGEMEM_ISA": "abacus"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "abacus" in done.stderr


@pytest.fixture(scope="module", params=("keep", "q4_0"))
def engine(request, shared, convert_store):
    store = convert_store(shared / "models" / "tiny-moe", request.param)
    return edgemem.load(store, context=128, threads=2)


def test_sessions_that_take_turns_answer_as_if_alone(engine):
    prompts = [answers.prompt(engine, which) for which in range(4)]
    alone = []
    for ids in prompts:
        with engine.session() as session:
            alone.append(answers.greedy(session, ids))
    sessions = [engine.session() for _ in prompts]
    turns = [session.feed(ids) for session, ids in zip(sessions, prompts, strict=True)]
    tokens = [[int(logits.argmax())] for logits in turns]
    for _ in range(answers.NEW_TOKENS - 1):
        for session, out in zip(sessions, tokens, strict=True):
            out.append(int(session.feed(out[-1:]).argmax()))
    assert tokens == alone


def test_sessions_in_threads_answer_as_if_alone(engine):
    def run(which: int) -> list[int]:
        with engine.session() as session:
            return answers.greedy(session, answers.prompt(engine, which))

    alone = [run(which) for which in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == alone


def test_pieces_of_a_prompt_give_the_logits_of_the_whole(engine):
    ids = answers.prompt(engine)
    whole = engine.logits(ids)
    for cuts in ((1,), (17,), (3, 4, 5), tuple(range(1, len(ids)))):
        with engine.session() as session:
            last = [session.feed(part.tolist()) for part in np.split(np.array(ids), cuts)]
            ends = [*(cut - 1 for cut in cuts), len(ids) - 1]
            assert np.array(last).tobytes() == whole[ends].tobytes(), cuts


def test_a_second_run_answers_the_same(engine):
    assert answers.digest(engine) == answers.digest(engine)
