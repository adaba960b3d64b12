"""Texts: reading, splits, networks, and a run from files to labels."""

import dataclasses
import json
import shutil

import pytest
import torch

from metalearn import load, testing
from metalearn.backbones.text import BagOfNGrams, HashedTokens, character_ngrams
from metalearn.backbones.text_encoder import TextEncoder
from metalearn.cli import train
from metalearn.config import checking, components, composition
from metalearn.data.tables import read_csv
from metalearn.data.text import Text, read_rows
from metalearn.run.build import build
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.sampling import Shape
from metalearn.tasks.types import InputSpec
from metalearn.testing import BACKBONE_CHECKS

_WORDS = (
    "card lost", "card broken", "weather today", "music loud", "door open", "lamp red",
    "train late", "bread fresh", "river deep", "pencil blunt", "engine hot", "paper thin",
)  # fmt: skip


def write_csv(path, encoding="utf-8", header="text,label\n", examples=12):
    rows = [
        f'"{word}, number {number} naïve",{word.split()[0]}{word.split()[1]}'
        for word in _WORDS
        for number in range(examples)
    ]
    path.write_bytes((header + "\n".join(rows) + "\n").encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("header", ["text,label\n", ""])
def test_csv_of_any_encoding_with_and_without_header(tmp_path, encoding, header):
    rows = read_rows(write_csv(tmp_path / "a.csv", encoding, header))
    assert len(rows) == 12 * len(_WORDS)
    assert rows[0] == ("card lost, number 0 naïve", "cardlost", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nhello,a\n,b\n", "row 3 has no text"),
        ("hello,a\nbye,\n", "row 2 has no label"),
        ('text,label\n"open,a\n', "cannot be read"),
        ("text,topic\nhello,a\n", "names no column label"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / "a.csv")


@pytest.mark.parametrize("delimiter", [";", "\t"])
@pytest.mark.parametrize("header", ["text{}label\n", ""])
def test_cells_may_be_separated_otherwise(tmp_path, delimiter, header):
    rows = f"hello, you{delimiter}a\nbye{delimiter}b\n" + f'"x{delimiter} y"{delimiter}b\n'
    (tmp_path / "a.csv").write_text(header.format(delimiter) + rows)
    texts = [("hello, you", "a", ""), ("bye", "b", ""), (f"x{delimiter} y", "b", "")]
    assert read_rows(tmp_path / "a.csv") == texts


@pytest.mark.parametrize("lines", [["well; yes", "no"], ["well; yes"]])
def test_one_column_is_not_taken_apart(tmp_path, lines):
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert read_csv(tmp_path / "a.csv") == [[line] for line in lines]


def test_an_encoding_with_zero_bytes_is_refused(tmp_path):
    for encoding in ("utf-32", "utf-16-le"):
        with pytest.raises(UserError, match="save it as UTF-8"):
            read_rows(write_csv(tmp_path / "a.csv", encoding))


def test_a_text_may_have_several_lines_and_files_may_be_corrupt(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",a\nb,b\n')
    assert [row.text for row in read_rows(tmp_path / "a.csv")] == ["two\nlines", "b"]
    (tmp_path / "domains.json").write_text("[1")
    with pytest.raises(UserError, match=r"domains\.json cannot be read"):
        opened(tmp_path, parts=["a.csv", "domains.json"])


def opened(path, **settings):
    tokenizer = HashedTokens(1000, 16, str.split)
    given = {
        "path": str(path), "split": "random", "split_seed": 0, "fractions": [0.5, 0.25, 0.25],
        "tokenizer": tokenizer, **settings,
    }  # fmt: skip
    return Text(**given).open(path.parent, path.parent, torch.device("cpu"))


def test_domains_are_kept_apart_and_shared_labels_are_split(tmp_path):
    path = tmp_path / "reviews.csv"
    lines = [
        f"{domain},{label},{domain} text {number} {label}"
        for domain in ("books", "films", "shoes")
        for label in (0, 1)
        for number in range(4)
    ]
    path.write_text("\n".join(["domain,label,text", *lines, lines[0]]))
    domains = {"train": "shoes", "val": "books", "test": "films"}
    data = opened(path, split="domains", domains=domains)
    assert data.class_names("train") == ("shoes/0", "shoes/1")
    assert data.class_names("test") == ("films/0", "films/1")
    assert data.views["val"].index.counts.tolist() == [4, 4]  # the repeated text is left out
    assert opened(path, split="domains", domains={}).class_names("test")[0].endswith("/0")


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ({"train": "a", "val": "a", "test": "b"}, "has domain 'a' in both train and val"),
        ({"train": "a", "val": "b,e", "test": "c"}, "names domain 'e', which .* does not have"),
        ({"train": "a", "test": "b"}, "should name domains for train, val and test"),
    ],
)
def test_wrong_splits_of_domains_are_refused(domains, message, tmp_path):
    lines = [f"{domain},{domain}{number},text {number}" for domain in "abcd" for number in range(5)]
    path = tmp_path / "a.csv"
    path.write_text("domain,label,text\n" + "\n".join(lines))
    with pytest.raises(UserError, match=rf"dataset\.domains.* {message}"):
        opened(path, split="domains", domains=domains)
    with pytest.raises(UserError, match=r"dataset\.split=domains: .* has no column domain"):
        opened(write_csv(tmp_path / "b.csv"), split="domains")


def test_texts_of_no_class_are_distractors(tmp_path):
    path = write_csv(tmp_path / "a.csv")
    path.write_text(path.read_text() + "".join(f"strange {n},oos\n" for n in range(40)))
    plain, data = opened(path), opened(path, distractors="oos")
    assert "oos" not in [name for split in data.views for name in data.class_names(split)]
    strange = {int(data.stores["train"].values[rows[0]][0]) for rows in data.pools.values()}
    (word,) = strange  # the first word of each of these texts
    pools = [set(rows.tolist()) for rows in data.pools.values()]
    assert sum(map(len, pools)) == len(set.union(*pools)) == 40  # each in one split
    shape = Shape(2, 1, 3, unlabelled=2, distractors=3)
    without = dataclasses.replace(shape, distractors=0)
    tasks = data.episodes("test", shape, 0).draw(0, 50)
    same = data.episodes("test", without, 0).draw(0, 50)
    assert torch.equal(tasks.query.x, same.query.x) and torch.equal(tasks.support.x, same.support.x)
    is_strange = tasks.support.unlabelled[..., 0] == word
    assert (is_strange.sum(1) == 6).all() and tasks.support.unlabelled.shape[1] == 10
    assert is_strange.double().mean(0).std() < 0.15  # at no particular place
    assert not (tasks.query.x[..., 0] == word).any()
    rows = [tuple(one.tolist()) for one in tasks.support.unlabelled[is_strange]]
    own = {tuple(one.tolist()) for one in data.stores["test"].values[data.pools["test"]]}
    assert set(rows) == own
    assert data.protocol("test")["distractor_label"] == "oos"
    assert "distractor_label" not in plain.protocol("test")
    whole = data.with_split("all")
    assert len(whole.pools["all"]) == 40
    with pytest.raises(UserError, match=r"distractors x unlabelled = 22, but there are only 10"):
        data.episodes("test", dataclasses.replace(shape, distractors=11), 0)
    with pytest.raises(UserError, match=r"dataset\.distractors=other: .* has no such label"):
        opened(path, distractors="other")


def test_published_folds_name_classes_that_may_be_missing(tmp_path):
    path = write_csv(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"names class .* which .* does not have"):
        opened(path, split="clinc150/1")
    with pytest.raises(UserError, match="should be clinc150/1 to 5"):
        opened(path, split="clinc150/6")
    with pytest.raises(UserError, match=r"there is no .*b\.csv; bring it there: a CSV file"):
        opened(tmp_path / "b.csv", by_hand="a CSV file")
    (tmp_path / "b.csv").write_text("text,label\n")
    with pytest.raises(UserError, match=r"b\.csv has no texts"):
        opened(tmp_path / "b.csv")
    with pytest.raises(UserError, match="use backbone=text_transformer"):
        opened(path, tokenizer=None)


@pytest.mark.parametrize("name", ["bag_of_ngrams", "text_transformer"])
def test_padding_changes_nothing(name):
    words = [f"backbone={name}", *(["backbone.width=16"] if "transformer" in name else [])]
    node = checking.check_config(composition.compose_config(words)).backbone
    backbone = components.make(node, "backbone")
    params, _ = backbone.init(InputSpec((9,), 30), prng.key_of(0))
    tokens = prng.integers(prng.key_of(1), (4, 6), 29) + 1
    padded = torch.nn.functional.pad(tokens, (0, 3))
    torch.testing.assert_close(backbone.embed(params, padded)[0], backbone.embed(params, tokens)[0])


def test_statistics_do_not_matter_without_normalisation(tmp_path):
    path = write_csv(tmp_path / "a.csv")
    words = [
        "algo=protonet", "dataset=text", f"dataset.path={path}", "backbone=bag_of_ngrams",
        "backbone.frozen=false", "episode.way=2", "episode.query=3", "train.meta_batch=2",
    ]  # fmt: skip
    runs = [
        build(checking.check_config(composition.compose_config([*words, f"statistics={one}"])))
        for one in ("population", "support")
    ]
    assert {run.protocol["statistics"] for run in runs} == {"none"}
    scores = [run.test_engine.scores(run.state, run.test.draw(0, 4)) for run in runs]
    assert torch.equal(*scores)


def test_bag_of_ngrams_counts(tmp_path):
    backbone = BagOfNGrams(ngram=3, features=50, length=20, frozen=True)
    text = "banana ban"
    grams = character_ngrams(text, 3)
    assert grams == [" ba", "ban", "ana", "nan", "ana", "na ", "a b", " ba", "ban", "an "]
    tokens = backbone.tokenizer()([text, "x"])
    params, _ = backbone.init(InputSpec((tokens.shape[1],), 51), prng.key_of(0))
    z, _ = backbone.embed(params, tokens)
    expected = torch.zeros(50)
    for token in tokens[0][tokens[0] > 0]:
        expected[token - 1] += 1
    torch.testing.assert_close(z[0], expected.sqrt() / expected.sqrt().norm())
    assert len(grams) == int((tokens[0] > 0).sum())


@pytest.mark.slow
def test_a_run_labels_texts(tmp_path):
    write_csv(tmp_path / "intents.csv")
    train_arguments = (
        "algo=protonet", "dataset=text", f"dataset.path={tmp_path}/intents.csv",
        "backbone=text_transformer", "backbone.width=16", "backbone.layers=1", "episode.way=2",
        "episode.train.way=3", "episode.query=3", "train.steps=20", "train.meta_batch=2",
        "val.every=20", "val.episodes=4", "test.episodes=4", "logger=none",
        f"hydra.run.dir={tmp_path}/run",
    )  # fmt: skip
    assert train.main(list(train_arguments)) == 0
    model = load(tmp_path / "run")
    examples = ["card lost one", "card lost two", "weather today one", "weather today two"]
    model.adapt(examples, ["card", "card", "weather", "weather"])
    long = "weather today " * 50
    assert model.predict(["card lost", "weather today", long]) == ["card", "weather", "weather"]
    assert model.predict("card lost") == ["card"]


@pytest.mark.slow
def test_methods_with_inner_loops_learn_from_texts(tmp_path, capsys):
    write_csv(tmp_path / "intents.csv")
    train_arguments = (
        "algo=maml", "dataset=text", f"dataset.path={tmp_path}/intents.csv",
        "backbone.width=8", "backbone.layers=1", "backbone.heads=2", "episode.way=2",
        "episode.query=3", "train.steps=2", "train.meta_batch=2", "val.every=2",
        "val.episodes=2", "test.episodes=2", "logger=none", f"hydra.run.dir={tmp_path}/run",
    )  # fmt: skip
    assert train.main(list(train_arguments)) == 0
    assert "test accuracy" in capsys.readouterr().out


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """Write a tiny sentence encoder."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({part for word in _WORDS for part in word.split()})
    vocabulary = {name: number for number, name in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("check", BACKBONE_CHECKS)
def test_text_encoder_fulfils_the_contract(encoder, check):
    words = ["backbone=text_encoder", f"backbone.model={encoder}", "backbone.frozen=false"]
    settings = checking.check_config(composition.compose_config(words)).backbone
    backbone = components.make(settings, "backbone")
    BACKBONE_CHECKS[check](testing.BackboneCase(backbone, InputSpec((6,), 20)))


@pytest.mark.slow
def test_text_encoder_ignores_padding_and_averages_its_own_states(encoder):
    from transformers import AutoModel

    backbone = TextEncoder(model=str(encoder), length=16, frozen=True)
    tokens = backbone.tokenizer()(["card lost", "weather today music"])
    assert tokens.shape == (2, 3) and tokens[0, 2] == 0
    inputs = InputSpec((3,), backbone.tokenizer().vocabulary)
    params, _ = backbone.init(inputs, prng.key_of(0))
    z, _ = backbone.embed(params, tokens)
    with torch.no_grad():
        states = AutoModel.from_pretrained(encoder).eval()(tokens[:1, :2] - 1)[0]
    torch.testing.assert_close(z[0], states[0].mean(0), atol=1e-5, rtol=1e-5)
    longer = torch.nn.functional.pad(tokens, (0, 5))
    torch.testing.assert_close(backbone.embed(params, longer)[0], z, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_token_0_of_an_encoder_is_a_token(encoder, tmp_path):
    """MPNet and RoBERTa begin each text with it, and pad with 1."""
    from transformers import AutoModel

    other = shutil.copytree(encoder, tmp_path / "other")
    content = json.loads((encoder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {"card": 0, "[PAD]": vocabulary["card"]}
    (other / "tokenizer.json").write_text(json.dumps(content))
    backbone = TextEncoder(model=str(other), length=16, frozen=True)
    tokens = backbone.tokenizer()(["card lost", "weather today music"])
    params, _ = backbone.init(InputSpec((3,), backbone.tokenizer().vocabulary), prng.key_of(0))
    with torch.no_grad():
        states = AutoModel.from_pretrained(encoder).eval()(torch.tensor([[0, vocabulary["lost"]]]))[
            0
        ]
    z, _ = backbone.embed(params, tokens)
    torch.testing.assert_close(z[0], states[0].mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_encoder_that_is_no_encoder_is_one_line(tmp_path):
    inputs = InputSpec((3,), 20)
    with pytest.raises(UserError, match=r"has no config\.json"):
        TextEncoder(model=str(tmp_path), length=16, frozen=True).init(inputs, prng.key_of(0))
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(UserError, match="not an encoder that transformers knows"):
        TextEncoder(model=str(tmp_path), length=16, frozen=True).init(inputs, prng.key_of(0))
