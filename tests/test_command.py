"""The command line says what is in a file, and what is wrong with it."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from functools import partial

import pytest
import torch
from test_decoder import checkpoint as gpt2_checkpoint
from test_decoder import folder as gpt2_folder
from test_decoder import in_two
from test_encoder import folder as bert_folder
from torch import nn

from minicompress import codes, entropy, models, pipeline, share, storage, zoo
from minicompress.__main__ import main
from minicompress.commands import as_module
from minicompress.commands.inspection import at_best, described


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

    def test_a_context_model_can_be_below_the_bound(self):
        left = (torch.arange(32) < 16).byte().repeat(32, 1)
        x = entropy.contextual(codes.Ints(left, 1))
        assert storage.payload(x) < at_best(x)
        assert at_best(x) == entropy.bound(codes.Ints(x.decode(), 1)) / 8

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

    def test_a_compact_header(self, tmp_path, capsys):
        path = tmp_path / "compact.mc"
        storage.save(path, zoo.load("digits-mlp"), compact=True)
        assert main(["verify", str(path)]) == 0
        assert "comes back whole" in capsys.readouterr().out

    def test_a_file_that_others_would_write_otherwise(self, tmp_path, capsys):
        path, model = tmp_path / "other.mc", models.MLP(widths=(2, 2))
        data = storage.dumps(model)
        text = data[9:-4].replace(b'{"model"', b'{ "model"')
        start = data[:5] + struct.pack("<I", len(text) - 24)
        body = start + text
        path.write_bytes(body + struct.pack("<I", zlib.crc32(body)))
        assert main(["verify", str(path)]) == 1
        assert "written again, it is another" in capsys.readouterr().err

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


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checkpoint(path, tensors):
    from safetensors.torch import save_file

    save_file(tensors, path)


def weights(n=64):
    g = torch.Generator().manual_seed(0)
    return {
        "encoder.0.weight": torch.randn(n, n, generator=g),
        "encoder.0.bias": torch.randn(n, generator=g),
        "conv.weight": torch.randn(8, 4, 3, 3, generator=g),
        "steps": torch.tensor(7),
    }


class TestCompress:
    @pytest.mark.parametrize("recipe", pipeline.RECIPES)
    def test_network_of_the_zoo(self, here, capsys, recipe):
        assert main(["compress", "digits-mlp", "--recipe", recipe]) == 0
        path = here / f"digits-mlp-{recipe}.mc"
        assert os.listdir() == [path.name]
        said = capsys.readouterr().out.splitlines()
        size = path.stat().st_size
        assert (
            f"{path.name}: {size:,} bytes, {26683 / size:.1f} times"
            in (said[-2])
        )
        assert said[-3] == "digits-mlp.mc: 26,683 bytes"
        found = zoo.quality(storage.load(path), zoo.task("digits-mlp"))
        assert said[-1] == (
            f"accuracy on the test split 97.20%, now {found:.2%}"
        )
        assert main(["verify", path.name]) == 0

    def test_rows_are_the_bytes_in_the_file(self, here, capsys):
        main(["compress", "digits-mlp", "--recipe", "int8"])
        said = capsys.readouterr().out.splitlines()[1:-3]
        state = storage.read("digits-mlp-int8.mc").state
        assert [line.split()[0] for line in said] == list(state)
        for line, x in zip(said, state.values(), strict=True):
            before, after = (int(v.replace(",", "")) for v in line.split()[-2:])
            assert before == 4 * math.prod(x.shape)
            assert after == storage.payload(x)

    def test_checkpoint_and_back(self, here, capsys):
        old = weights()
        checkpoint("model.safetensors", old)
        command = ["compress", "model.safetensors", "--recipe", "int8"]
        assert main([*command, "-o", "small.mc"]) == 0
        assert "accuracy" not in capsys.readouterr().out
        file = storage.read("small.mc")
        assert file.model is None and file.state.keys() == old.keys()
        assert main(["export", "small.mc", "-o", "back.safetensors"]) == 0
        assert main(["export", "small.mc", "-o", "back.pt"]) == 0
        from safetensors.torch import load_file

        back = load_file("back.safetensors")
        again = torch.load("back.pt", weights_only=True)
        for name, w in old.items():
            assert torch.equal(back[name], again[name])
            if w.ndim < 2:
                assert torch.equal(back[name], w)
            else:  # half a step of the row
                step = w.flatten(1).abs().amax(1) / 127
                error = (back[name] - w).flatten(1).abs().amax(1)
                assert (error <= step * 0.5001).all() and error.any()

    @pytest.mark.parametrize("family", ["gpt2", "bert"])
    def test_a_published_folder_becomes_a_model(self, family, here, capsys):
        (write, load) = {
            "gpt2": (gpt2_folder, zoo.decoder),
            "bert": (bert_folder, zoo.encoder),
        }[family]
        write(here / "own")
        old, _ = load(here / "own")
        held = (here / "own" / "model.safetensors").stat().st_size
        assert main(["compress", "own", "--recipe", "int8"]) == 0
        assert f"own: {held:,} bytes" in capsys.readouterr().out
        new = storage.load("own-int8.mc")
        assert type(new) is type(old) and new.config == old.config
        ids = torch.tensor([[3, 1, 2]])
        error = (new(ids) - old(ids)).norm() / old(ids).norm()
        assert 0 < error < 0.05
        config = json.loads((here / "own" / "config.json").read_text())
        config["model_type"] = "t5"
        (here / "own" / "config.json").write_text(json.dumps(config))
        assert main(["compress", "own", "--recipe", "int4"]) == 1
        assert "model_type is 't5'" in capsys.readouterr().err
        (here / "own" / "config.json").unlink()
        assert main(["compress", "own", "--recipe", "int4"]) == 1
        assert "own: a folder without config.json" in capsys.readouterr().err

    def test_all_files_of_a_folder_count(self, here, capsys):
        in_two(gpt2_folder(here / "own"), gpt2_checkpoint())
        files = (here / "own").glob("[ab].safetensors")
        held = sum(file.stat().st_size for file in files)
        assert main(["compress", "own", "--recipe", "int8"]) == 0
        assert f"own: {held:,} bytes" in capsys.readouterr().out

    def test_a_file_is_a_source_too(self, here):
        main(["compress", "digits-mlp", "--recipe", "int8", "-o", "a.mc"])
        assert main(["compress", "a.mc", "--recipe", "kmeans4"]) == 0
        again = storage.load("a-kmeans4.mc")
        assert again.layers[0].weight.unique().numel() == 16
        own = codes.encode(nn.Linear(30, 20), lambda w: w)
        storage.save("own.mc", nn.Linear(30, 20), own)
        assert main(["compress", "own.mc", "--recipe", "int8"]) == 0
        assert storage.read("own-int8.mc").state.keys() == own.keys()

    def test_tied_tensors_stay_one(self, here):
        model = models.LM(vocab=50, width=32, layers=1, heads=2, ff=64)
        storage.save("lm.mc", model)
        assert main(["compress", "lm.mc", "--recipe", "nf4"]) == 0
        again = storage.load("lm-nf4.mc")
        assert again.head.weight is again.tokens.weight

    def test_half_precision_checkpoint(self, here):
        half = {n: w.bfloat16() for n, w in weights().items() if w.ndim}
        checkpoint("half.safetensors", half)
        assert main(["compress", "half.safetensors", "--recipe", "int4"]) == 0
        assert main(["verify", "half-int4.mc"]) == 0

    @pytest.mark.parametrize("source", ("zoo", "checkpoint"))
    def test_budget(self, here, capsys, source):
        checkpoint("model.safetensors", weights())
        name = {"zoo": "digits-mlp", "checkpoint": "model.safetensors"}[source]
        for budget in (9000, 5500):
            command = ["compress", name, "--budget", str(budget), "-o"]
            assert main([*command, f"{budget}.mc"]) == 0
            assert os.path.getsize(f"{budget}.mc") <= budget
            assert os.path.getsize(f"{budget}.mc") > 0.6 * budget
        assert main([*command[:3], "100"]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"{name}: budget: 100 bytes, but the smallest file" in said

    def test_a_budget_asks_the_data_of_the_zoo(self, here, monkeypatch):
        asked = []
        plan = pipeline.mixed

        def spy(model, *, metric, **options):
            asked.append(metric)
            return plan(model, metric=metric, **options)

        monkeypatch.setattr(pipeline, "mixed", spy)
        main(["compress", "digits-mlp", "--budget", "6000"])
        main(["compress", "digits-mlp-6000.mc", "--budget", "5500"])
        with torch.no_grad():
            X, y = (t[:1000] for t in zoo.task("digits-mlp").train)
            model = zoo.load("digits-mlp")
            loss = nn.functional.cross_entropy(model(X), y).item()
        assert asked[0](model) == pytest.approx(loss, rel=1e-6)
        assert asked[1] is None

    def test_deep_trains_and_is_much_smaller(self, here, capsys, monkeypatch):
        monkeypatch.setattr("minicompress.commands.compression.STEPS", 64)
        torch.set_num_threads(1)
        assert main(["compress", "digits-mlp", "--recipe", "deep"]) == 0
        said = capsys.readouterr()
        assert os.path.getsize("digits-mlp-deep.mc") < 26683 / 8
        assert float(said.out.split("now ")[1].rstrip("%\n")) > 85
        assert "80/80" in said.err  # five epochs; progress is no result
        model = storage.load("digits-mlp-deep.mc")
        w = model.layers[0].weight
        assert w.unique().numel() <= 17 and (w == 0).double().mean() > 0.5

    def test_deep_needs_data(self, here, capsys):
        checkpoint("model.safetensors", weights())
        command = ["compress", "model.safetensors", "--recipe", "deep"]
        assert main(command) == 1
        assert "on the zoo's data only" in capsys.readouterr().err

    def test_never_overwrites_unless_told(self, here, capsys):
        path = here / "digits-mlp-int8.mc"
        path.write_text("mine")
        command = ["compress", "digits-mlp", "--recipe", "int8"]
        assert main(command) == 1
        assert path.read_text() == "mine"
        said = capsys.readouterr().err
        assert said == (
            "digits-mlp: digits-mlp-int8.mc exists; --force overwrites it\n"
        )
        assert main([*command, "--force"]) == 0
        assert main(["verify", path.name]) == 0
        assert main(["export", path.name, "-o", path.name + ".pt"]) == 0
        assert main(["export", path.name, "-o", path.name + ".pt"]) == 1
        assert sorted(os.listdir()) == [path.name, path.name + ".pt"]

    def test_a_file_that_comes_meanwhile_is_left_alone(self, here, monkeypatch):
        path = here / "digits-mlp-int8.mc"
        written = pipeline.written

        def slow(*arguments, **options):
            path.write_text("mine")
            return written(*arguments, **options)

        monkeypatch.setattr(pipeline, "written", slow)
        assert main(["compress", "digits-mlp", "--recipe", "int8"]) == 1
        assert path.read_text() == "mine" and os.listdir() == [path.name]

    def test_a_file_that_does_not_come_back_is_not_left(
        self, here, monkeypatch, capsys
    ):
        def wrong(path):
            raise ValueError("it is another file")

        monkeypatch.setattr("minicompress.commands.compression.verify", wrong)
        assert main(["compress", "digits-mlp", "--recipe", "int8"]) == 1
        assert "it is another file" in capsys.readouterr().err
        assert os.listdir() == []

    @pytest.mark.parametrize(
        ("source", "why"),
        [
            ("digits", "neither a file nor in the zoo, which has digits-cnn"),
            ("text.mc", "not a minicompress file"),
            ("bad.safetensors", "the header claims"),
            ("nan.safetensors", "a.weight: W (2, 2) must be finite"),
        ],
    )
    def test_bad_sources(self, here, capsys, source, why):
        (here / "text.mc").write_text("hello, nothing here")
        (here / "bad.safetensors").write_text("hello, nothing here")
        bad = torch.full((2, 2), math.nan)
        checkpoint("nan.safetensors", {"a.weight": bad})
        assert main(["compress", source, "--recipe", "int8", "-o", "x.mc"]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"{source}: ") and why in said
        assert not (here / "x.mc").exists()

    def test_a_folder_that_is_not_there(self, here, capsys):
        command = ["compress", "digits-mlp", "--recipe", "int8", "-o", "a/b.mc"]
        assert main(command) == 1
        assert capsys.readouterr().err == "digits-mlp: a: no such folder\n"

    def test_list(self, capsys):
        assert main(["compress", "--list"]) == 0
        said = capsys.readouterr().out
        for name in (*pipeline.RECIPES, "deep"):
            assert f"\n{name} " in said
        assert all(name in said.splitlines()[-1] for name in zoo.names())

    @pytest.mark.parametrize(
        "words",
        (
            ["digits-mlp"],
            ["digits-mlp", "--recipe", "int9"],
            ["digits-mlp", "--recipe", "int8", "--budget", "9"],
            ["digits-mlp", "--budget", "-9"],
            ["--recipe", "int8"],
        ),
    )
    def test_wrong_command_lines(self, here, words, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["compress", *words])
        assert caught.value.code == 2
        assert "usage: minicompress compress" in capsys.readouterr().err
        assert os.listdir() == []

    def test_ctrl_c_leaves_nothing_behind(self, here):
        command = [sys.executable, "-W", "error", "-m", "minicompress"]
        words = ["compress", "digits-cnn", "--recipe", "deep"]
        run = subprocess.Popen(
            [*command, *words],
            stderr=subprocess.PIPE,
            text=True,
            # a shell's background jobs, such as these tests, may ignore it
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        said = ""
        while "it/s" not in said:  # in the middle of a training
            said += run.stderr.read(1)
            assert run.poll() is None
        time.sleep(0.2)
        run.send_signal(signal.SIGINT)
        _, rest = run.communicate(timeout=60)
        assert run.returncode == 130
        assert "Traceback" not in rest and "interrupted" in rest
        assert os.listdir() == []


class TestExport:
    def test_names_what_it_can_write(self, small, capsys):
        assert main(["export", str(small), "-o", "a.onnx"]) == 1
        said = capsys.readouterr().err
        assert "a.onnx should end in .safetensors or .pt" in said

    def test_any_name_of_a_checkpoint(self):
        t = torch.ones(2)
        odd = {"type": t, "a": t, "a.b": torch.ones(3), "x..y": torch.zeros(1)}
        again = as_module(odd).state_dict()
        assert again.keys() == odd.keys()
        assert all(torch.equal(again[name], odd[name]) for name in odd)
        assert again["type"].data_ptr() == again["a"].data_ptr()


class TestScore:
    def test_exit_status_tells_who_passed(self, here, capsys):
        torch.manual_seed(0)
        storage.save("new.mc", models.MLP(widths=(784, 36)))
        assert main(["score", "new.mc", "--seed", "5"]) == 1
        said = capsys.readouterr().out
        assert "bytes" in said and "seed 5: not passed" in said

    def test_a_hostile_file(self, here, capsys):
        (here / "bad.mc").write_text("hello, nothing here")
        assert main(["score", "bad.mc", "missing.mc"]) == 1
        bad, missing = capsys.readouterr().err.splitlines()
        assert bad.startswith("bad.mc: not a minicompress file")
        assert missing == "missing.mc: No such file or directory"

    def test_all_must_pass(self, monkeypatch, capsys):
        marks = {"a": 0.95, "b": 0.85}

        def fake(path, seed):
            return pipeline.Score(1, marks[path.name], 0.0, 10, seed or 0)

        monkeypatch.setattr("minicompress.pipeline.contest.score", fake)
        assert main(["score", "a", "a"]) == 0
        assert main(["score", "a", "b"]) == 1
        assert main(["score", "b", "a"]) == 1
