"""Files of weights: what is no weights is not read, and what is published is fetched once."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from densepred.errors import DensepredError, InputError, ResourceError, UnsafeError
from densepred.models.adapters.source import IMAGENET, Source
from densepred.models.encoders.resnet import ResNetEncoder
from densepred.models.weights import (
    load_weights,
    read_state,
)
from densepred.models.weights.fetch import obtain
from densepred.models.weights.sources import is_file, resolve
from tests.random_weights import CLOSE, randomized


class Runs:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_that_could_run_code_is_not_opened(tmp_path: Path) -> None:
    for number, legacy in enumerate((True, False)):
        file = tmp_path / f"{number}.pth"
        torch.save(
            {"weight": torch.zeros(2), "more": Runs(tmp_path / "ran")}, file, _use_new_zipfile_serialization=legacy
        )
        with pytest.raises(
            UnsafeError, match=r"needs getattr and could run code; it is not opened\n  fix: use its safetensors form"
        ):
            read_state(file)
    assert not (tmp_path / "ran").exists()


def test_a_program_is_not_opened_and_no_advice_to_do_so_is_passed_on(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(tmp_path / "a.pt"))
    with pytest.raises(
        UnsafeError, match=r"a TorchScript program, which holds code; it is not opened\n  fix: save"
    ) as e:
        read_state(tmp_path / "a.pt")
    assert "weights_only" not in str(e.value)


def test_a_dict_that_holds_itself_ends(tmp_path: Path) -> None:
    state: dict[str, object] = {}
    state["state_dict"] = state
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(InputError, match="holds no named tensors but the keys state_dict"):
        read_state(tmp_path / "a.pth")


PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "page": (lambda _: PAGE, "a web page, not weights"),
    "page after blanks": (lambda _: b"\n\n " + PAGE, "a web page, not weights"),
    "pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
    "cut short": (lambda data: data[: len(data) // 2], "not a whole"),
    "cut in the header": (lambda data: data[:12], "not a whole"),
    "empty": (lambda _: b"", "neither safetensors nor written by torch.save"),
    "noise": (lambda _: bytes(range(100, 200)), "neither safetensors nor written by torch.save"),
}


@pytest.mark.parametrize("form", ["safetensors", "pth"])
@pytest.mark.parametrize("fault", BAD)
def test_files_that_are_no_weights_are_told_apart(fault: str, form: str, tmp_path: Path) -> None:
    file, (spoil, message) = tmp_path / f"a.{form}", BAD[fault]
    tensors = {"conv1.weight": torch.randn(64, 3, 7, 7)}
    (save_file if form == "safetensors" else torch.save)(tensors, file)
    assert read_state(file).keys() == tensors.keys()
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        read_state(file)
    assert str(file) in str(caught.value)


def test_old_files_and_wrapped_ones_are_read(tmp_path: Path) -> None:
    """torchvision's VGGs are in the form of before torch 1.6."""
    torch.save({"model": {"a": torch.ones(2)}, "epoch": 4}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_state(tmp_path / "old.pth")["a"].tolist() == [1, 1]
    torch.save({"a": torch.ones(5000)}, tmp_path / "cut.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "cut.pth").read_bytes()
    for count in (20, len(whole) // 2, len(whole) - 3):
        (tmp_path / "cut.pth").write_bytes(whole[:count])
        with pytest.raises(InputError, match="not a whole file of weights"):
            read_state(tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes(whole[: whole.index(b"_rebuild_tensor") + 4])  # within a name
    with pytest.raises(DensepredError, match=r"not a whole file of weights|a pickle that needs"):
        read_state(tmp_path / "cut.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds no named tensors but list"):
        read_state(tmp_path / "list.pth")
    with pytest.raises(InputError, match="no such file of weights"):
        read_state(tmp_path / "absent.pth")


class Server:
    """Serves one answer and counts the requests."""

    def __init__(self) -> None:
        self.answer, self.requests, self.cut = b"", 0, 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests += 1
                self.send_response(200)
                self.send_header("Content-Length", str(len(outer.answer)))
                self.end_headers()
                self.wfile.write(outer.answer[: len(outer.answer) - outer.cut])

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/a.safetensors"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DENSEPRED_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "cache"


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    save_file({"a": torch.ones(3)}, tmp_path / "content")
    return (tmp_path / "content").read_bytes()


def digest(data: bytes, digits: int = 8) -> str:
    return hashlib.sha256(data).hexdigest()[:digits]


def test_weights_are_downloaded_once(server: Server, cache: Path, content: bytes) -> None:
    server.answer = content
    source = Source("x", server.url, "a.safetensors", digest(content), *IMAGENET)
    assert obtain(source) == cache / "a.safetensors"
    assert obtain(source).read_bytes() == content
    assert server.requests == 1
    assert [path.name for path in cache.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("hashed", [True, False])
def test_a_page_in_the_place_of_weights_is_not_kept(server: Server, cache: Path, content: bytes, hashed: bool) -> None:
    server.answer = PAGE
    source = Source("x", server.url, "a.safetensors", digest(content) if hashed else None, *IMAGENET)
    with pytest.raises(InputError, match="a web page, not weights") as caught:
        obtain(source)
    assert f"put it at {cache / 'a.safetensors'}" in str(caught.value)
    assert not list(cache.iterdir())


def test_a_download_that_broke_off_is_not_kept(server: Server, cache: Path, content: bytes) -> None:
    server.answer, server.cut = content, 5
    with pytest.raises(DensepredError, match=r"not a whole file of weights|cannot be downloaded"):
        obtain(Source("x", server.url, "a.safetensors", None, *IMAGENET))
    assert not list(cache.iterdir())


def test_an_answer_that_is_no_http_is_a_failed_download(cache: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            connection.recv(4096)
            connection.sendall(b"garbage\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.pth"
        with pytest.raises(ResourceError, match="cannot be downloaded"):
            obtain(Source("x", url, "a.pth", None, *IMAGENET))


def test_other_weights_than_published_are_refused(server: Server, cache: Path, content: bytes) -> None:
    server.answer = content
    source = Source("x", server.url, "a.safetensors", "0123abcd", *IMAGENET)
    with pytest.raises(UnsafeError, match=f"its SHA-256 starts {digest(content)}, not 0123abcd"):
        obtain(source)
    assert not list(cache.iterdir())
    (cache / "a.safetensors").write_bytes(content)
    with pytest.raises(UnsafeError, match="not the published weights"):
        obtain(source)
    assert server.requests == 1


def test_offline_one_message_says_what_to_fetch_and_where_to_put_it(
    server: Server, cache: Path, content: bytes
) -> None:
    server.http.shutdown()
    server.http.server_close()
    source = Source("x", server.url, "a.safetensors", digest(content), *IMAGENET)
    with pytest.raises(ResourceError) as caught:
        obtain(source)
    text = str(caught.value)
    assert f"{server.url} cannot be downloaded" in text
    assert f"(SHA-256 {digest(content)}...), put it at {cache / 'a.safetensors'} and run the same command again" in text
    (cache / "a.safetensors").write_bytes(content)
    assert obtain(source).read_bytes() == content


def test_torch_hubs_copy_is_used(server: Server, cache: Path, tmp_path: Path, content: bytes) -> None:
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "a.safetensors").write_bytes(content)
    source = Source("x", server.url, "a.safetensors", digest(content), *IMAGENET)
    assert obtain(source) == hub / "a.safetensors"
    assert not server.requests
    server.answer = content[:-1] + b"?"
    with pytest.raises(UnsafeError, match="not the published weights"):  # the copy is another version: it downloads
        obtain(dataclasses.replace(source, sha256="0123abcd"))
    assert server.requests == 1


@pytest.mark.parametrize(
    ("source", "encoder", "file"),
    [
        ("imagenet", "resnet18", "resnet18-f37072fd.pth"),
        ("torchvision", "convnext_tiny", "convnext_tiny-983f1562.pth"),
        ("torchvision:IMAGENET1K_V1", "resnet50", "resnet50-0676ba61.pth"),
        ("torchvision:IMAGENET1K_V2", "resnet50", "resnet50-11ad3fa6.pth"),
        ("imagenet", "vgg16_bn", "vgg16_bn-6c64b313.pth"),
        ("timm:a1_in1k", "resnet50", "timm-resnet50.a1_in1k.safetensors"),
        ("timm", "se_resnet50", "timm-seresnet50.a1_in1k.safetensors"),
        ("imagenet", "convnextv2_tiny", "timm-convnextv2_tiny.fcmae_ft_in22k_in1k.safetensors"),
        ("imagenet", "torchvision.densenet121", "densenet121-a639ec97.pth"),
        ("smp:ssl", "resnet50", "smp-resnet50.ssl.safetensors"),
        ("imagenet", "smp.mobilenet_v2", "smp-mobilenet_v2.imagenet.safetensors"),
    ],
)
def test_names_stand_for_published_files(source: str, encoder: str, file: str) -> None:
    assert resolve(source, encoder).file == file


def test_a_file_of_a_published_name_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("imagenet", "timm", "mine"):
        Path(name).touch()
    assert [is_file(name) for name in ("imagenet", "timm", "./imagenet", "mine", "none")] == [
        False,
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("source", "encoder", "message"),
    [
        ("imagnet", "resnet18", r"pretrained must be one of imagenet, torchvision, .*did you mean 'imagenet'\?"),
        ("imagenet:V1", "resnet18", "pretrained must be one of imagenet"),
        ("torchvision:IMAGENET1K_V3", "resnet18", "must be one of .*IMAGENET1K_V1, .*got 'IMAGENET1K_V3'"),
        ("torchvision", "se_resnet50", "weights of se_resnet50 must be timm's"),
        ("smp", "timm.resnet18", "weights of timm.resnet18 must be timm's, which it is a network of, got 'smp'"),
        ("imagenet", "plain", "plain"),
    ],
)
def test_names_that_stand_for_nothing(source: str, encoder: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(source, encoder)


def test_published_weights_that_lie_in_the_cache_are_loaded_by_name(cache: Path) -> None:
    theirs = randomized(ResNetEncoder(2, 3))
    cache.mkdir()
    save_file(theirs.state_dict(), cache / "timm-resnet18.a1_in1k.safetensors")
    ours = ResNetEncoder(3, 1)
    report = load_weights(ours, "timm:a1_in1k", "resnet18")
    assert report.complete
    assert str(report).startswith(f"timm.resnet18.a1_in1k ({cache}")
    assert ours.pretraining.source == "timm.resnet18.a1_in1k"
    assert ours.pretraining.mean == pytest.approx((0.449,), abs=1e-6)
    grey = theirs.conv1.weight.sum(1, keepdim=True)
    torch.testing.assert_close(ours.conv1.weight.sum(2), grey, **CLOSE)
    with pytest.raises(ValueError, match="name must be the encoder's"):
        load_weights(ours, "imagenet")
