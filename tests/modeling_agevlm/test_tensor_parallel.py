"""Two processes with half of the heads and of the feed-forward widths each are one model."""

import os
import re
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file


GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}


def test_the_plan_names_every_matrix_of_the_language_model(model):
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    planned = {re.sub(r"\.\d+\.", ".*.", name) for name in linear if ".language_model." in name} | {"lm_head"}
    assert planned <= set(model.tp_plan)
    modules = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in model.named_modules()}
    new = {rule for rule in model.tp_plan if ".cross_attention." in rule}
    assert len(new) == 9 and new <= modules
    assert not any(rule.startswith(("model.vision_tower", "model.multi_modal_projector")) for rule in model.tp_plan)


RANKS = textwrap.dedent(
    """
    import os, sys
    import torch
    from torch.distributed.tensor import DTensor
    from transformers.distributed import DistributedConfig
    from age_vlm import AgeVlmForConditionalGeneration

    def run(rank, folder):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        job = torch.load(f"{folder}/job.pt")
        model = AgeVlmForConditionalGeneration.from_pretrained(
            f"{folder}/model", distributed_config=DistributedConfig(tp_plan="auto")
        )
        attention = model.model.language_model.layers[1].cross_attention.attn
        with torch.no_grad():
            outputs = model(**job["batch"], use_cache=True, cross_attention_queries=job["rows"])
            answers = [model.generate(**job["batch"], **options) for options in job["options"]]
        outputs_in_training = model.train()(
            **job["batch"], labels=job["batch"]["input_ids"], cross_attention_queries=job["rows"]
        )
        # Of one head, which one process has.
        (outputs_in_training.loss + (outputs_in_training.cross_attention_maps[1][:, 3] * job["target"]).sum()).backward()
        gradients = {
            name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in model.named_parameters()
        }
        torch.save(
            {
                "local": attention.q_proj.weight.to_local().shape,
                "image_keys": outputs.cache.layers[1].image_keys,
                "logits": outputs.logits,
                "maps": outputs.cross_attention_maps,
                "answers": answers,
                "gradients": gradients,
            },
            f"{folder}/{rank}.pt",
        )
        model.save_pretrained(f"{folder}/saved")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    if __name__ == "__main__":
        torch.set_num_threads(1)
        # Forked, not started anew: importing takes longer than running.
        torch.multiprocessing.start_processes(run, (sys.argv[1],), nprocs=2, start_method="fork")
    """
)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"),
    reason="transformers' tensor parallelism calls what torch has from 2.7 on",
)
def test_two_processes_are_one_model(make_model, make_batch, tmp_path):
    model, batch = make_model(), make_batch((2, 0, 1))
    rows = torch.tensor([[0, 13], [2, 13]])
    options = [GREEDY, GREEDY | {"num_beams": 2}]
    model.save_pretrained(tmp_path / "model")
    target = 10 * torch.rand(2, model(**batch, cross_attention_queries=rows).cross_attention_maps[1].shape[-1])
    torch.save({"batch": batch, "rows": rows, "options": options, "target": target}, tmp_path / "job.pt")
    (tmp_path / "ranks.py").write_text(RANKS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "ranks.py"), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    with torch.no_grad():
        alone = model(**batch, use_cache=True, cross_attention_queries=rows)
    assert first["local"] == (16, 32), "half of the rows of the query matrix"
    halves = torch.cat([first["image_keys"], second["image_keys"]], dim=1)
    torch.testing.assert_close(halves, alone.cache.layers[1].image_keys, atol=1e-5, rtol=1e-4)
    for rank in (first, second):
        torch.testing.assert_close(rank["logits"], alone.logits, atol=1e-4, rtol=1e-4)
        for answer, choice in zip(rank["answers"], options):
            assert torch.equal(answer, model.generate(**batch, **choice))
    for rank in (first, second):
        for whole, ours in zip(alone.cross_attention_maps, rank["maps"], strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-4)

    outputs = model.train()(**batch, labels=batch["input_ids"], cross_attention_queries=rows)
    (outputs.loss + (outputs.cross_attention_maps[1][:, 3] * target).sum()).backward()
    for name, parameter in model.named_parameters():
        for rank in (first, second):
            torch.testing.assert_close(
                rank["gradients"][name],
                parameter.grad,
                atol=1e-4,
                rtol=1e-3,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    saved, original = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "model"))
    # transformers saves a gathered matrix that two layers share under both of their names.
    assert saved.keys() - original.keys() <= {"lm_head.weight"}
    assert all(torch.equal(saved[name], value) for name, value in original.items())
