"""One update of d3rlpy and of ours from equal weights and batch: how far apart are the parameters afterwards?

    python tests/benchmark/d3rlpy_update.py d3venv/bin/python      # made as d3rlpy_check.py says

All noise is 0 on both sides. Prints the largest difference of each network, and the share of its parameters that
differ by more than 1e-6 (Adam's first step is its rate, 3e-4 or 1e-3, whatever the size of a gradient, so those whose
gradient is rounding alone may differ by twice that). Where d3rlpy goes in another order (it moves critics first, so
that CRR's and CQL's actor sees them moved, and IQL's Q the V of before), its steps are called one by one from the
weights that ours had. d3rlpy's BCQ gets the tanh that its decoder leaves out, and CQL's temperature stays.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import d3rlpy_check
import numpy as np
import torch

SCRIPTS = {"IQL": "iql_red", "TD3PlusBC": "td3_bc_red", "CRR": "crr_red", "BCQ": "bcq", "CQL": "cql_red"}
NAMES = {"critic": "q_funcs", "actor": "policy", "target_critic": "targ_q_funcs", "target_actor": "targ_policy"}
NAMES |= {"value": "value_func", "encoder": "vae_encoder", "decoder": "vae_decoder"}
NAMES |= {"perturbation": "policy", "target_perturbation": "targ_policy"}
# steps of d3rlpy: the call, the networks that are as after our update when it begins, those that are compared
STEPS = {
    "IQL": [("update_critic", [], ["value"]), ("update_critic", ["value"], ["critic"])]
    + [("update_actor", ["value"], ["actor"])],
    "TD3PlusBC": [("inner_update", [], ["critic", "actor", "target_critic", "target_actor"])],
    "CRR": [("update_critic", [], ["critic"]), ("update_actor", [], ["actor"])],
    "BCQ": [("inner_update", [], ["encoder", "decoder", "critic", "perturbation", "target_critic"])],
    "CQL": [("update_critic", [], ["critic"]), ("update_actor", [], ["actor"])],
}
NOISE = {"TD3PlusBC": (256, 3), "CRR": (5, 256, 3), "BCQ": (12 * 256, 6), "CQL": (32, 256, 3)}


def ours(name, data, path):
    """Writes the weights before and after our update, layer by layer, and its batch."""
    module = __import__(SCRIPTS[name])
    options = {"vae_hidden_sizes": (128, 128), "learning_rate": 1e-3} if name == "BCQ" else {}
    args = module.Args(hidden_sizes=(128, 128), batch_size=256, device="cpu", **options)
    chosen = np.random.default_rng(0).choice(len(data.obs), 256)
    columns = data.obs, data.action.clip(-0.999, 0.999), data.reward, data.next_obs, 1 - data.terminated
    batch = [torch.from_numpy(np.float32(column[chosen]))[None] for column in columns]
    torch.manual_seed(0)
    agent = module.Agent(data.obs if name in ("TD3PlusBC", "CQL") else 11, 3, args)
    with torch.no_grad():
        for parameter in agent.parameters():  # targets shall differ from what they follow
            parameter.add_(0.01 * torch.randn_like(parameter))
        if name == "IQL":
            agent.actor.log_std.fill_(-1.5)  # where d3rlpy's begins
        if name == "CQL":  # whose standard deviation has no scale and shift, and whose temperature begins at 1
            agent.actor.log_std_scale.fill_(1)
            agent.actor.log_std_shift.fill_(0)
            agent.log_alpha.fill_(0)

    saved = {"all_obs": data.obs}
    for when in ("before", "after"):
        for key, net in [*agent.named_children(), *(agent.vae.named_children() if name == "BCQ" else [])]:
            mlps = [x for x in net.modules() if isinstance(x, module.MLP)] if key in NAMES else []
            layers = [(weight[n], bias[n]) for mlp in mlps for n in range(mlp.C) for weight, bias in mlp.layers]
            for i, layer in enumerate(layers):
                saved[f"{when} {key} {i}"] = torch.cat(layer).T.detach().clone()  # (out, in + 1)
        if when == "before":
            more = [torch.zeros(1, *NOISE[name])] if name in NOISE else []
            more += {"TD3PlusBC": [True], "CRR": [torch.tensor(0.0)]}.get(name, [])
            module.update(agent, *batch, *more, args)
    obs, action, reward, next_obs, not_terminated = [x[0].numpy() for x in batch]
    columns = obs, action, reward[:, None], next_obs, action, 1 - not_terminated[:, None]
    np.savez(path, **saved, **{f"column {i}": column for i, column in enumerate(columns)})


def groups(net):
    """Linear layers of a network of d3rlpy; the two heads of a Gaussian are one group, as in ours."""
    found = [[x] for x in net.modules() if isinstance(x, torch.nn.Linear)]
    if isinstance(getattr(net, "_logstd", None), torch.nn.Linear):
        found[-2:] = [found[-2] + found[-1]]
    return found


def theirs(name, path):
    from d3rlpy.dataset import TransitionMiniBatch
    from d3rlpy.torch_utility import TorchMiniBatch

    saved = dict(np.load(path))
    batch = TransitionMiniBatch(*[saved[f"column {i}"] for i in range(6)], np.ones((256, 1), np.float32), [])
    d3rlpy_check.THEIRS["CQL"]["temp_learning_rate"] = 0.0
    known = sorted({key.split()[1] for key in saved if key.startswith("before")})
    for call, moved, compared in STEPS[name]:
        algo = d3rlpy_check.make_theirs(name, 10**9, saved["all_obs"])
        nets = {key: getattr(algo.impl._modules, NAMES[key]) for key in known}
        for key, net in nets.items():
            for i, group in enumerate(groups(net)):
                rows = torch.from_numpy(saved[f"{'after' if key in moved else 'before'} {key} {i}"])
                for linear, part in zip(group, rows.split([x.out_features for x in group])):
                    linear.weight.data.copy_(part[:, :-1])
                    linear.bias.data.copy_(part[:, -1])
        if name == "BCQ":
            decoder = nets["decoder"]
            forward = decoder.forward
            decoder.forward = lambda x, latent, with_squash: forward(x, latent, False)
        torch_batch = TorchMiniBatch.from_batch(batch, 0.99, False, "cpu", algo.config.observation_scaler)
        zeros = lambda *shape, dtype=None, device=None: torch.zeros(*shape)
        with (
            mock.patch("torch.randn", zeros),
            mock.patch("torch.distributions.normal._standard_normal", zeros),
            mock.patch("torch.Tensor.uniform_", lambda x, *bounds: x),  # of zeros
        ):
            getattr(algo.impl, call)(torch_batch, *([0] if call == "inner_update" else []))
        for key in compared:
            differences = []
            for i, group in enumerate(groups(nets[key])):
                made = torch.cat([torch.cat([x.weight, x.bias[:, None]], 1) for x in group])  # (out, in + 1)
                differences.append((made.detach() - torch.from_numpy(saved[f"after {key} {i}"])).abs().flatten())
            differences = torch.cat(differences)
            share = 100 * (differences > 1e-6).float().mean()
            print(f"{name} {key}: {differences.max():.1e}, {share:.2f} % above 1e-6", flush=True)


if __name__ == "__main__":
    if sys.argv[1] in SCRIPTS:
        theirs(*sys.argv[1:])
    else:
        sys.path.append(str(d3rlpy_check.ROOT / "algorithms"))
        import iql_red

        data = iql_red.load_data(iql_red.Args())
        with tempfile.TemporaryDirectory() as folder:
            for name in SCRIPTS:
                path = Path(folder, f"{name}.npz")
                ours(name, data, path)
                subprocess.run([sys.argv[1], __file__, name, path], check=True)
