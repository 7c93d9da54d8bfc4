import errno
import os
import re
import resource

import pytest
import torch
from safetensors.torch import save_file

from age_vlm import AgeVlmConfig
from age_vlm.errors import (
    UserError,
    check_new_file,
    check_new_folder,
    checkpoint_errors,
    filling,
    reading,
    run_command,
    writing,
)
from age_vlm.processing.images_agevlm import load_rgb


def raising(error):
    def command():
        raise error

    return command


def test_what_a_user_can_mend_is_one_sentence(capsys):
    assert run_command("tool", lambda: None) == 0
    assert run_command("tool", raising(UserError("seed: got -1,\n  expected 0 or more."))) == 2
    assert capsys.readouterr().err == "tool: seed: got -1, expected 0 or more.\n"
    assert run_command("tool", raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))) == 2
    assert re.fullmatch("tool: CUDA out of memory; expected less .*\n", capsys.readouterr().err)
    assert run_command("tool", raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""


def test_debug_shows_where_it_comes_from_too(capsys):
    assert run_command("tool", raising(UserError("seed: got -1.")), debug=True) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1] == "tool: seed: got -1."


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError, KeyError, FileNotFoundError, UnicodeError])
def test_faults_of_ours_keep_their_traceback(error):
    with pytest.raises(error, match="a fault"):
        run_command("tool", raising(error("a fault")))


def test_only_what_checkpoint_code_says_itself_is_a_users(tmp_path):
    with pytest.raises(UserError, match="^images: 'none.png' is not a file") as caught, checkpoint_errors():
        load_rgb("none.png")
    assert type(caught.value.__cause__) is ValueError
    with pytest.raises(UserError, match="^image_visibility"), checkpoint_errors():
        AgeVlmConfig(image_visibility="all")
    with pytest.raises(UserError, match="^ours") as caught, checkpoint_errors():
        raise UserError("ours")
    assert caught.value.__cause__ is None
    for call in (lambda: int("x"), lambda: torch.zeros(3).view(2, -1, -1), lambda: AgeVlmConfig.from_dict(7)):
        with pytest.raises(Exception) as caught, checkpoint_errors():
            call()
        assert not isinstance(caught.value, UserError)


def test_what_is_wrong_with_a_file_is_a_users(tmp_path):
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    for path, words in (("none", "No such file"), (".", "Is a directory"), ("text/x", "Not a dir"), ("text", "UTF-8")):
        with (
            pytest.raises(UserError, match=rf"^--file: '.*{path}' .*{words}.*[.]$"),
            reading("--file", tmp_path / path),
        ):
            (tmp_path / path).read_text("utf-8")
    with (
        pytest.raises(UserError, match="^--out: .* could not be written: Is a directory.$"),
        writing("--out", tmp_path),
    ):
        tmp_path.write_text("x")
    for block in (reading, writing, filling):
        with pytest.raises(ZeroDivisionError), block("--file", "x"):
            raise ZeroDivisionError


def test_a_full_disk_is_a_users_and_other_errors_in_a_long_block_are_not():
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with pytest.raises(UserError, match="^run folder: 'out' could not be written: "), filling("run folder", "out"):
            raise OSError(code, os.strerror(code))
    for error in (FileNotFoundError(errno.ENOENT, "none"), RuntimeError("a fault"), ValueError("a fault")):
        with pytest.raises(type(error)), filling("run folder", "out"):
            raise error


def test_torch_and_safetensors_say_so_in_their_own_way(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Files that grow beyond this fail to be written, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for save in (torch.save, save_file):
            words = "^run folder: 'out' could not be written: .*[^.][.]$"
            with pytest.raises(UserError, match=words), filling("run folder", "out"):
                save({"x": torch.zeros(10**5)}, tmp_path / "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_place_is_looked_at_before_the_work_is_done(tmp_path):
    (tmp_path / "file").touch()
    check_new_folder("--output", tmp_path / "deep" / "new")
    check_new_folder("--output", tmp_path)
    check_new_file("--json", tmp_path / "new.json")
    check_new_file("--json", tmp_path / "file")
    with pytest.raises(UserError, match="^--output: .*file/new' cannot be a folder: .*file' is a file"):
        check_new_folder("--output", tmp_path / "file" / "new")
    with pytest.raises(UserError, match="^--json: .* is a folder"):
        check_new_file("--json", tmp_path)
    with pytest.raises(UserError, match="^--json: .*no/x' is not in a folder that exists"):
        check_new_file("--json", tmp_path / "no" / "x")


@pytest.fixture
def nobody():
    """Nobody in particular, who may not do what root may."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_a_place_that_may_not_be_written(nobody):
    for check in (check_new_folder, check_new_file):
        with pytest.raises(UserError, match="^--output: '/usr/new' cannot be written: .* does not allow it"):
            check("--output", "/usr/new")
