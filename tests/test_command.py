"""The command line says what is in a file, and what is wrong with it."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from minicompress import codes, entropy, models, share, storage, zoo
from minicompress.__main__ import at_best, described, main


def four_bits(w):
    step = w.abs().max() / 7
    q = codes.Ints((w / step).round().long() + 7, bits=4)
    return codes.Affine(entropy.huffman(q), step, zero=7)


@pytest.fixture
def small(tmp_path):
    model = zoo.load("digits-mlp")
    path = tmp_path / "small.mc"
    storage.save(path, model, codes.encode(model, four_bits))
    return path


def rows(text):
    return {line.split()[0]: line.split() for line in text.splitlines()[3:-2]}


class TestInfo:
    def test_bytes_add_up_to_the_file(self, small, capsys):
        assert main(["info", str(small)]) == 0
        said = capsys.readouterr().out
        size = small.stat().st_size
        assert said.startswith(f"{small}: {size:,} bytes\nMLP(widths=[64")
        held = [int(row[-3].replace(",", "")) for row in rows(said).values()]
        rest = int(said.split("checksum ")[1].split("\n")[0].replace(",", ""))
        assert len(held) == 6 and sum(held) + rest == size
        assert f"6,570 numbers, {8 * size / 6570:.2f} bits each" in said

    def test_a_row_tells_the_code_and_its_bound(self, small, capsys):
        main(["info", str(small)])
        row = rows(capsys.readouterr().out)["layers.0.weight"]
        code = storage.read(small).state["layers.0.weight"]
        assert row[1] == "64×64"
        assert " ".join(row[2:4]) == "Affine(Huffman(4 bits))"
        held, best = (float(row[i].replace(",", "")) for i in (4, 6))
        assert held == storage.payload(code)
        # bits that name one of all sequences with these counts, and a scale
        counts = entropy.counts(code.q)
        bits = math.lgamma(4097) - sum(math.lgamma(c + 1) for c in counts)
        assert best == pytest.approx(bits / math.log(2) / 8 + 4, abs=0.5)
        assert best < held

    def test_a_tied_tensor_has_no_bytes_of_its_own(self, tmp_path, capsys):
        path = tmp_path / "lm.mc"
        model = models.LM(vocab=9, width=8, layers=2, heads=2, ff=8, context=4)
        storage.save(path, share.tie_blocks(model, "blocks"))
        assert main(["info", str(path)]) == 0
        said = rows(capsys.readouterr().out)
        assert said["head.weight"][-2:] == ["is", "tokens.weight"]
        assert said["blocks.1.up.weight"][-1] == "blocks.0.up.weight"

    def test_a_model_of_a_user(self, tmp_path, capsys):
        path = tmp_path / "own.mc"
        storage.save(path, nn.Sequential(nn.Linear(3, 2)))
        assert main(["info", str(path)]) == 0
        assert "described nowhere" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("code", "text"),
        [
            (torch.zeros(2), "float32"),
            (codes.Ints(torch.zeros(2, dtype=torch.uint8), 3), "Ints(3 bits)"),
            (
                codes.sparse(torch.eye(4), torch.eye(4) > 0),
                "Sparse",
            ),
        ],
    )
    def test_names_of_codes(self, code, text):
        assert described(code) == text

    def test_integers_that_are_all_equal_cost_nothing_at_best(self):
        ints = codes.Ints(torch.zeros(100, dtype=torch.uint8), 8)
        assert at_best(ints) == pytest.approx(0, abs=1e-9)
        assert at_best(torch.zeros(5)) == 20


class TestVerify:
    def test_good_files(self, small, capsys):
        files = [str(small), *(str(zoo.path(name)) for name in zoo.names())]
        assert main(["verify", *files]) == 0
        assert capsys.readouterr().out.count("comes back whole") == len(files)

    def test_a_model_of_a_user_is_decoded(self, tmp_path, capsys):
        path = tmp_path / "own.mc"
        storage.save(path, nn.Linear(3, 2))
        assert main(["verify", str(path)]) == 0
        assert "2 tensors decode" in capsys.readouterr().out

    def test_numbers_that_are_not_finite(self, tmp_path, capsys):
        path, model = tmp_path / "bad.mc", models.MLP(widths=(2, 2))
        model.layers[0].bias.data[0] = math.nan
        storage.save(path, model)
        assert main(["verify", str(path)]) == 1
        said = capsys.readouterr().err
        assert "layers.0.bias holds numbers that are not finite" in said


class TestWhatIsWrong:
    @pytest.mark.parametrize("command", ("info", "verify"))
    def test_one_bad_file_spoils_the_status_and_not_the_rest(
        self, small, tmp_path, capsys, command
    ):
        data = bytearray(small.read_bytes())
        data[-50] ^= 1
        (tmp_path / "flipped.mc").write_bytes(data)
        (tmp_path / "text.mc").write_text("hello, nothing here")
        names = ("flipped.mc", "text.mc", "missing.mc", "small.mc")
        paths = [str(tmp_path / name) for name in names]
        assert main([command, *paths]) == 1
        said = capsys.readouterr()
        flipped, text, missing = said.err.splitlines()
        assert flipped.endswith("the checksum is wrong")
        assert text.endswith("not a minicompress file: it does not start so")
        assert missing == f"{paths[2]}: No such file or directory"
        assert str(small) in said.out

    @pytest.mark.parametrize("words", ([], ["inform", "a.mc"], ["info"]))
    def test_a_wrong_command_line(self, words, capsys):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        assert "usage: minicompress" in capsys.readouterr().err

    def test_as_a_module(self, small):
        command = [sys.executable, "-m", "minicompress", "verify", str(small)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0
        assert done.stdout.endswith("3,260 bytes, comes back whole\n")
