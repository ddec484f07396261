"""What is trained on, what is held out, and windows."""

import pytest
import torch

from rewriter.errors import RewriterError
from rewriter.evaluate import held_out_texts, split, windows


@pytest.fixture
def assets(tmp_path):
    for folder, names in {
        "austen": ["emma", "pride_and_prejudice"],
        "brown": ["ca01", "cr01", "cr09"],
        "wikipedia": [f"{i:03}" for i in range(21)],
    }.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.txt").write_text(f"text of {name}")
    return tmp_path


def test_split(assets, monkeypatch):
    found = split(assets)
    held = {name: [p.stem for p in paths] for name, paths in found.held_out.items()}
    assert held == {
        "pride_and_prejudice": ["pride_and_prejudice"],
        "brown": ["cr01", "cr09"],
        "wikipedia": ["000", "010", "020"],
    }
    assert len(found.train) == 20 and not set(found.train) & {
        p for paths in found.held_out.values() for p in paths
    }
    monkeypatch.setenv("REWRITER_ASSETS", str(assets))
    assert held_out_texts()["brown"] == "text of cr01\n\ntext of cr09"
    assert next(iter(held_out_texts())) == "pride_and_prejudice"


def test_the_users_text(assets, tmp_path):
    assert held_out_texts(tmp_path / "austen" / "emma.txt") == {"emma": "text of emma"}
    assert held_out_texts(["one", "two"]) == {"data": "one\n\ntwo"}
    assert list(held_out_texts(str(assets / "brown"))) == ["brown"]
    with pytest.raises(RewriterError, match="no file or folder"):
        held_out_texts("./none.txt")


def test_windows(tokenizer):
    text = "".join(chr(97 + i % 26) for i in range(3000))
    found = windows(tokenizer, text, 101, 3, skip=1 / 3)
    assert found.shape == (3, 101) and (found[:, 0] == 256).all()
    rest = tokenizer(text[1000:], add_special_tokens=False)["input_ids"]
    assert torch.equal(found[:, 1:].flatten(), torch.tensor(rest[:300]))
    assert windows(tokenizer, text, 101, 99, skip=1 / 3).shape == (20, 101)
    # too short after a third: from the beginning
    assert tokenizer.decode(windows(tokenizer, text, 2501, 1, skip=1 / 3)[0, 1:3]) == "ab"
    with pytest.raises(RewriterError, match="only 3000 tokens"):
        windows(tokenizer, text, 5000, 1)
