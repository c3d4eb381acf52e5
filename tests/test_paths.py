"""What people type for a path becomes a path of this system."""

from pathlib import Path

import pytest
from diffusion_trainer.utils.paths import local_path


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A system with a mounted D: and a home folder."""
    (tmp_path / "mnt" / "d").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "root").mkdir()
    return str(tmp_path)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (r"C:\a\b", "/mnt/c/a/b"),
        ("C:/a/b", "/mnt/c/a/b"),
        (r"c:\My Pictures\it's", "/mnt/c/My Pictures/it's"),
        ("C:\\", "/mnt/c"),
        ("C:", "/mnt/c"),
        (r"C:\a/b\c", "/mnt/c/a/b/c"),
        (r"C:\\a\\b", "/mnt/c/a/b"),
        (r"\\?\C:\a", "/mnt/c/a"),
        (r"C:\home\x", "/mnt/c/home/x"),  # C is a Windows drive whatever lies at the root
        (r"D:\home\x", "/mnt/d/home/x"),  # mounted
        (r"Z:\home\x", "/home/x"),
        ("z:/root/m", "/root/m"),
        (r"Z:\home\new\deeper", "/home/new/deeper"),
        (r"Z:\elsewhere\x", "/mnt/z/elsewhere/x"),
        (r"\\wsl.localhost\Ubuntu\home\x", "/home/x"),
        (r"\\WSL.localhost\Ubuntu-24.04\home\x", "/home/x"),
        ("//wsl.localhost/Ubuntu/home/x", "/home/x"),
        (r"\\wsl$\Ubuntu\home\x", "/home/x"),
        ("//wsl$/Ubuntu/mnt/c/x", "/mnt/c/x"),
        (r"\\?\UNC\wsl$\Ubuntu\home\x", "/home/x"),
        (r"\\wsl$\Ubuntu", "/"),
        (r"\\server\share\x", r"\\server\share\x"),
        (r"/home/x\y", "/home/x/y"),
        ("/home/x", "/home/x"),
        ("models/flux", "models/flux"),
        (r"flux\dev.safetensors", "flux/dev.safetensors"),
        ("", ""),
        ("   ", ""),
        ('"C:\\a b\\c"', "/mnt/c/a b/c"),
        ("  '/home/x y' ", "/home/x y"),
        ("“/home/x”", "/home/x"),
        ("/home/图片/🎨", "/home/图片/🎨"),
        ("it's", "it's"),
    ],
)
def test_on_linux(typed: str, expected: str, root: str) -> None:
    assert local_path(typed, windows=False, root=root) == expected


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/pics", windows=False) == "/home/me/pics"
    assert local_path(r"~\pics", windows=False) == "/home/me/pics"


@pytest.mark.parametrize("typed", [r"C:\a\b", "C:/a/b", r"\\wsl$\Ubuntu\home\x", r"\\server\share", r"a\b"])
def test_native_windows_keeps_its_paths(typed: str) -> None:
    assert local_path(typed, windows=True) == typed
    assert local_path(f' "{typed}" ', windows=True) == typed


def test_twice_is_once(root: str) -> None:
    for typed in (r"Z:\home\x", r"C:\a", r"\\wsl$\U\home\x", "a/b"):
        once = local_path(typed, windows=False, root=root)
        assert local_path(once, windows=False, root=root) == once
