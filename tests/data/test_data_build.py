import itertools
import json

import pytest

from vlm.batch import IGNORE_INDEX, Skip
from vlm.data.build import build_data, build_template
from vlm.data.config import DataConfig, SourceConfig
from vlm.data.template import TEMPLATES
from vlm.errors import ConfigError, DataError


@pytest.fixture
def build(bpe, spec):
    def make(path, tokenizer=bpe, image_spec=spec, seed=3, **settings):
        sources = [SourceConfig(path=str(path))]
        defaults = {"max_length": 96, "max_images": 3, "cache": str(path.parent / "cache"), "sources": sources}
        image_id = None if image_spec is None else tokenizer.convert_tokens_to_ids("<image>")
        return build_data(
            DataConfig(**defaults | settings), tokenizer, image_spec, image_id,
            seed=seed, global_batch_size=4, micro_batch_size=2,
        )  # fmt: skip

    return make


def places(batches):
    return [where for batch in batches for where in batch.where]


def test_data_says_what_was_found_before_training(records, build, tmp_path, capsys):
    path = records(40)
    (tmp_path / "4.png").unlink()
    data = build(path)
    assert data.num_records == 40
    assert [(skip.rule, skip.where) for skip in data.skips] == [("image_missing", "records.jsonl: line 5")]
    assert data.held_out is None
    assert len(data.scans) == 1
    assert "data.sources: 1 of 40 records skipped (image_missing 1)" in capsys.readouterr().err


def test_more_bad_records_than_the_share_stop_the_run_before_it_starts(records, build, tmp_path):
    path = records(12)
    (tmp_path / "4.png").unlink()
    with pytest.raises(DataError, match=r"1 of 12 records skipped \(image_missing 1\)") as caught:
        build(path)
    assert caught.value.exit_code == 3
    assert len(build(path, max_skipped_share=0.1).skips) == 1


def test_eval_sources_are_evaluated_whole_and_never_trained_on(records, build):
    other = SourceConfig(path=str(records(7, name="other.jsonl")))
    data = build(records(20), eval_sources=[other])
    assert sorted(places(data.held_out)) == sorted(f"other.jsonl: line {n}" for n in range(1, 8))
    assert places(data.held_out) == places(data.held_out)
    step = next(itertools.islice(data.train.iterate(), 1))
    assert all(where.startswith("records.jsonl") for where in places(step))
    assert len(data.scans) == 2


def test_eval_batches_are_packed_like_training_and_cover_every_label_once(records, build, bpe):
    data = build(records(60), held_out=0.3)
    batches = list(data.held_out)
    assert len(batches) == len(data.held_out)
    assert all(batch.input_ids.shape[1] == 96 for batch in batches)
    learned = "".join(bpe.decode(batch.labels[batch.labels != IGNORE_INDEX]) for batch in batches)
    numbers = [int(where.split()[-1]) - 1 for where in places(batches)]
    assert learned == "".join(f"Answer {number}.<|im_end|>" for number in numbers)
    assert max(len(batch.where) for batch in batches) > 2  # more records than rows


def test_bad_eval_sources_stop_the_run_too(records, build):
    path = records(6, name="bad.jsonl")
    path.write_text("{}\n" * 6)
    with pytest.raises(DataError, match="6 of 6 records skipped"):
        build(records(6), eval_sources=[SourceConfig(path=str(path))])


def test_text_alone_needs_no_image_spec(tmp_path, build):
    turns = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"conversations": turns}) + "\n")
    data = build(path, image_spec=None)
    (batch, empty) = next(data.train.iterate())
    assert (batch.pixel_values, empty.num_supervised) == (None, 0)


def test_images_for_a_model_without_an_encoder_are_skipped_by_rule(records, build):
    data = build(records(12), image_spec=None, max_skipped_share=0.7)
    assert {skip.rule for skip in data.skips} == {"image_without_encoder"}
    assert len(data.skips) == 8
    assert isinstance(data.skips[0], Skip)


def test_the_template_is_one_of_ours_or_the_tokenizers_own(bpe, monkeypatch):
    assert build_template("vicuna", bpe) is TEMPLATES["vicuna"]
    own = TEMPLATES["chatml"].jinja(None, "<|im_end|>", tokenizer_adds_bos=False)
    monkeypatch.setattr(bpe, "chat_template", own)
    assert build_template("tokenizer", bpe) == TEMPLATES["chatml"]


def test_a_template_of_another_family_is_refused_or_warned_about(records, build, bpe, capsys):
    with pytest.raises(ConfigError, match=r"ends replies with <\|eot_id\|>, which is no token"):
        build(records(4), template="llama3")
    assert "<|start_header_id|>, <|end_header_id|>, <|eot_id|> are no single token" in capsys.readouterr().err
    build(records(4), template="chatml")
    assert "single token" not in capsys.readouterr().err
