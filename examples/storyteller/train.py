"""Trains the storyteller and writes it as a GGUF file in F32, which build/moe-quantize makes small.

    apt-get install python3-torch
    OMP_NUM_THREADS=1 python3 train.py --out storyteller-f32.gguf [--steps 6000] [--processes 2]

The matrices are small: two processes, each with half of a step's stories, are faster than one with
two threads. The result depends on the seed and on the number of processes.

A deepseek2 model: multi-head latent attention, one leading dense layer, then layers of routed
experts (sigmoid gating, two of them per token) and a shared one. The load of the experts is
balanced as in the DeepSeek-V3 report, 2.1.2: a bias that only counts for choosing goes up for
experts with less than their share of the tokens, and down for the others.
"""
import argparse
import math
import random
import struct
import time

import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F

import bpe
import grammar
import words

N_EMBD, N_LAYER, N_HEAD = 256, 4, 4
NOPE, ROPE, V_DIM, KV_LORA = 32, 32, 64, 128
N_EXPERT, N_USED, FF_EXPERT, FF_DENSE = 8, 2, 256, 512
CONTEXT, N_MERGES, EPS, BASE = 512, 1790, 1e-6, 10000.0
SPECIALS = ["<|begin|>", "<|end|>"]


def norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rotate(x, cos, sin):
    """Pairs (2 i, 2 i + 1) are turned; x: [..., position, ROPE]."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Storyteller(torch.nn.Module):
    def __init__(self, n_vocab):
        super().__init__()
        self.n_vocab = n_vocab

        def matrix(*shape, scale=1.0):
            return torch.nn.Parameter(torch.randn(*shape) * scale / math.sqrt(shape[-1]))

        def ones(n):
            return torch.nn.Parameter(torch.ones(n))

        out = 1 / math.sqrt(2 * N_LAYER)  # what is added to the residual begins small
        # As large as what the layers add: which token it is must not drown, or copying is learned late.
        self.embd = torch.nn.Parameter(torch.randn(n_vocab, N_EMBD))
        self.output = matrix(n_vocab, N_EMBD)
        self.output_norm = ones(N_EMBD)
        self.layers = torch.nn.ModuleList()
        for il in range(N_LAYER):
            p = {
                "attn_norm": ones(N_EMBD), "ffn_norm": ones(N_EMBD),
                "attn_q": matrix(N_HEAD * (NOPE + ROPE), N_EMBD),
                "attn_kv_a_mqa": matrix(KV_LORA + ROPE, N_EMBD), "attn_kv_a_norm": ones(KV_LORA),
                "kv_b": matrix(N_HEAD, NOPE + V_DIM, KV_LORA),
                "attn_output": matrix(N_EMBD, N_HEAD * V_DIM, scale=out),
            }
            if il == 0:
                p["ffn_gate"], p["ffn_up"] = matrix(FF_DENSE, N_EMBD), matrix(FF_DENSE, N_EMBD)
                p["ffn_down"] = matrix(N_EMBD, FF_DENSE, scale=out)
            else:
                p["ffn_gate_inp"] = matrix(N_EXPERT, N_EMBD)
                p["ffn_gate_exps"] = matrix(N_EXPERT, FF_EXPERT, N_EMBD)
                p["ffn_up_exps"] = matrix(N_EXPERT, FF_EXPERT, N_EMBD)
                p["ffn_down_exps"] = matrix(N_EXPERT, N_EMBD, FF_EXPERT, scale=out)
                p["ffn_gate_shexp"] = matrix(FF_EXPERT, N_EMBD)
                p["ffn_up_shexp"] = matrix(FF_EXPERT, N_EMBD)
                p["ffn_down_shexp"] = matrix(N_EMBD, FF_EXPERT, scale=out)
            self.layers.append(torch.nn.ParameterDict(p))
        self.bias = torch.zeros(N_LAYER, N_EXPERT)
        self.load = torch.zeros(N_LAYER, N_EXPERT)  # tokens per expert in the last pass
        angle = torch.outer(torch.arange(CONTEXT).float(),
                            BASE ** (-torch.arange(0, ROPE, 2).float() / ROPE))
        self.cos, self.sin = angle.cos(), angle.sin()

    def attention(self, p, x):
        b, n, _ = x.shape
        cos, sin = self.cos[:n], self.sin[:n]
        q = (x @ p["attn_q"].T).view(b, n, N_HEAD, NOPE + ROPE).transpose(1, 2)
        q = torch.cat((q[..., :NOPE], rotate(q[..., NOPE:], cos, sin)), -1)
        latent = x @ p["attn_kv_a_mqa"].T
        turned = rotate(latent[..., KV_LORA:], cos, sin)[:, None].expand(-1, N_HEAD, -1, -1)
        kv = torch.einsum("bnl,hvl->bhnv", norm(latent[..., :KV_LORA], p["attn_kv_a_norm"]),
                          p["kv_b"])
        k = torch.cat((kv[..., :NOPE], turned), -1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(NOPE + ROPE)
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        out = scores.masked_fill(future, -math.inf).softmax(-1) @ kv[..., NOPE:]
        return out.transpose(1, 2).reshape(b, n, N_HEAD * V_DIM) @ p["attn_output"].T

    def experts(self, p, il, x):
        gate = torch.sigmoid(x @ p["ffn_gate_inp"].T)
        chosen = (gate.detach() + self.bias[il]).topk(N_USED, -1).indices
        weight = gate.gather(-1, chosen)
        weight = weight / weight.sum(-1, keepdim=True)
        out = (F.silu(x @ p["ffn_gate_shexp"].T) * (x @ p["ffn_up_shexp"].T)) @ p["ffn_down_shexp"].T
        self.load[il] = torch.bincount(chosen.flatten(), minlength=N_EXPERT).float()
        for e in range(N_EXPERT):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            if not len(token):
                continue
            y = x[token]
            y = F.silu(y @ p["ffn_gate_exps"][e].T) * (y @ p["ffn_up_exps"][e].T)
            y = (y @ p["ffn_down_exps"][e].T) * weight[token, slot, None]
            out = out.index_add(0, token, y)
        return out

    def forward(self, tokens):
        x = self.embd[tokens]
        for il, p in enumerate(self.layers):
            x = x + self.attention(p, norm(x, p["attn_norm"]))
            y = norm(x, p["ffn_norm"])
            if il == 0:
                y = (F.silu(y @ p["ffn_gate"].T) * (y @ p["ffn_up"].T)) @ p["ffn_down"].T
            else:
                y = self.experts(p, il, y.reshape(-1, N_EMBD)).view_as(x)
            x = x + y
        return norm(x, self.output_norm) @ self.output.T

    def balance(self, rate):
        share = self.load[1:].sum(-1, keepdim=True) / N_EXPERT
        self.bias[1:] += rate * torch.sign(share - self.load[1:])


# ---- GGUF ----------------------------------------------------------------------------------------


class Gguf:
    """A GGUF file in the making: metadata and F32 tensors."""

    def __init__(self):
        self.keys, self.tensors = [], []

    def text(self, s):
        s = s.encode()
        return struct.pack("<Q", len(s)) + s

    def put(self, key, kind, data):
        self.keys.append(self.text(key) + struct.pack("<I", kind) + data)

    def add(self, key, value):
        if isinstance(value, bool):
            self.put(key, 7, struct.pack("<?", value))
        elif isinstance(value, int):
            self.put(key, 4, struct.pack("<I", value))
        elif isinstance(value, float):
            self.put(key, 6, struct.pack("<f", value))
        elif isinstance(value, str):
            self.put(key, 8, self.text(value))
        elif isinstance(value[0], str):
            head = struct.pack("<IQ", 8, len(value))
            self.put(key, 9, head + b"".join(self.text(v) for v in value))
        else:
            self.put(key, 9, struct.pack("<IQ%di" % len(value), 5, len(value), *value))

    def tensor(self, name, data):
        self.tensors.append((name, data.detach().float().contiguous()))

    def write(self, path):
        infos, offset = b"", 0
        for name, data in self.tensors:
            shape = list(reversed(data.shape))
            infos += self.text(name) + struct.pack("<I%dQIQ" % len(shape), len(shape), *shape, 0,
                                                   offset)
            offset += (data.numel() * 4 + 31) // 32 * 32
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.keys))
        head += b"".join(self.keys) + infos
        with open(path, "wb") as f:
            f.write(head + bytes(-len(head) % 32))
            for _, data in self.tensors:
                raw = data.numpy().tobytes()
                f.write(raw + bytes(-len(raw) % 32))


def export(model, vocabulary, path):
    g = Gguf()
    arch = "deepseek2."
    g.add("general.architecture", "deepseek2")
    g.add("general.name", "storyteller")
    for key, value in {
        "block_count": N_LAYER, "context_length": CONTEXT, "embedding_length": N_EMBD,
        "feed_forward_length": FF_DENSE, "leading_dense_block_count": 1, "vocab_size": model.n_vocab,
        "attention.head_count": N_HEAD, "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": EPS, "attention.kv_lora_rank": KV_LORA,
        "attention.key_length": KV_LORA + ROPE, "attention.value_length": KV_LORA,
        "attention.key_length_mla": NOPE + ROPE, "attention.value_length_mla": V_DIM,
        "rope.dimension_count": ROPE, "rope.freq_base": BASE, "expert_count": N_EXPERT,
        "expert_used_count": N_USED, "expert_shared_count": 1,
        "expert_feed_forward_length": FF_EXPERT, "expert_weights_norm": True,
        "expert_weights_scale": 1.0, "expert_gating_func": 2,
    }.items():
        g.add(arch + key, value)
    g.add("tokenizer.ggml.model", "gpt2")
    g.add("tokenizer.ggml.pre", "gpt-2")
    g.add("tokenizer.ggml.tokens", vocabulary.tokens)
    g.add("tokenizer.ggml.token_type", [1] * (len(vocabulary.tokens) - 2) + [3, 3])
    g.add("tokenizer.ggml.merges", [a + " " + b for a, b in vocabulary.merges])
    g.add("tokenizer.ggml.bos_token_id", len(vocabulary.tokens) - 2)
    g.add("tokenizer.ggml.eos_token_id", len(vocabulary.tokens) - 1)
    g.add("tokenizer.ggml.add_bos_token", True)
    g.tensor("token_embd.weight", model.embd)
    g.tensor("output_norm.weight", model.output_norm)
    g.tensor("output.weight", model.output)
    for il, p in enumerate(model.layers):
        for name, value in p.items():
            if name != "kv_b":
                g.tensor("blk.%d.%s.weight" % (il, name), value)
        g.tensor("blk.%d.attn_k_b.weight" % il, p["kv_b"][:, :NOPE].transpose(1, 2))
        g.tensor("blk.%d.attn_v_b.weight" % il, p["kv_b"][:, NOPE:])
        if il:
            g.tensor("blk.%d.exp_probs_b.bias" % il, model.bias[il])
    g.write(path)


def read(path):
    """The vocabulary and the tensors of a file that export() wrote."""
    data, at, lists, tensors = open(path, "rb").read(), 8, {}, []

    def take(format):
        nonlocal at
        values = struct.unpack_from("<" + format, data, at)
        at += struct.calcsize("<" + format)
        return values[0] if len(values) == 1 else values

    def text():
        nonlocal at
        n = take("Q")
        at += n
        return data[at - n : at].decode()

    n_tensors, n_keys = take("QQ")
    for _ in range(n_keys):
        key, kind = text(), take("I")
        if kind == 9:
            kind, n = take("IQ")
            lists[key] = [text() if kind == 8 else take("i") for _ in range(n)]
        elif kind == 8:
            text()
        else:
            take({4: "I", 6: "f", 7: "?"}[kind])
    for _ in range(n_tensors):
        name, n_dims = text(), take("I")
        shape = [take("Q") for _ in range(n_dims)]
        tensors.append((name, shape[::-1], take("IQ")[1]))
    begin = (at + 31) // 32 * 32
    merges = [tuple(m.split(" ")) for m in lists["tokenizer.ggml.merges"]]
    return bpe.Vocabulary(merges, SPECIALS), {
        name: torch.frombuffer(bytearray(data[begin + offset : begin + offset + 4 * math.prod(shape)]),
                               dtype=torch.float32).view(shape) for name, shape, offset in tensors}


def restore(model, tensors):
    """What export() wrote becomes the model's weights."""
    with torch.no_grad():
        model.embd.copy_(tensors["token_embd.weight"])
        model.output_norm.copy_(tensors["output_norm.weight"])
        model.output.copy_(tensors["output.weight"])
        for il, p in enumerate(model.layers):
            for name, value in p.items():
                if name != "kv_b":
                    value.copy_(tensors["blk.%d.%s.weight" % (il, name)])
            k_b, v_b = (tensors["blk.%d.attn_%s_b.weight" % (il, kv)] for kv in "kv")
            p["kv_b"].copy_(torch.cat((k_b.transpose(1, 2), v_b), 1))
            if il:
                model.bias[il] = tensors["blk.%d.exp_probs_b.bias" % il]


# ---- training ------------------------------------------------------------------------------------


def batches(vocabulary, seed, n_rows, pool=16):
    """Batches without end: (tokens, the token after each), a story in a row. After the shorter stories
    comes padding: -1 where a next token does not count. As little of it as possible: of `pool`
    batches' stories each gets those of nearly the same length."""
    begin, end = len(vocabulary.tokens) - 2, len(vocabulary.tokens) - 1
    rng = random.Random(seed)
    while True:
        stories = sorted(([begin] + vocabulary.encode(grammar.story(rng)) + [end]
                          for _ in range(n_rows * pool)), key=len)
        groups = [stories[i : i + n_rows] for i in range(0, len(stories), n_rows)]
        rng.shuffle(groups)
        for group in groups:
            longest = len(group[-1])
            yield (torch.tensor([(s + [end] * (longest - len(s)))[:-1] for s in group]),
                   torch.tensor([s[1:] + [-1] * (longest - len(s)) for s in group]))


def loss_of(model, batch):
    tokens, following = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten(), ignore_index=-1)


def average(model, n_processes):
    """Gradients and experts' loads become the mean over all processes: the same in each."""
    if n_processes == 1:
        return
    tensors = [p.grad for p in model.parameters()] + [model.load]
    flat = torch.cat([t.flatten() for t in tensors])
    torch.distributed.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(part.view_as(t) / n_processes)


def train(rank, options, vocabulary, weights):
    n = options.processes
    if n > 1:
        torch.distributed.init_process_group(
            "gloo", init_method="tcp://127.0.0.1:29431", rank=rank, world_size=n)
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)
    model = Storyteller(len(vocabulary.tokens))
    if weights:
        restore(model, weights)
    decayed = [p for p in model.parameters() if p.dim() > 1 and p is not model.embd]
    plain = [model.embd] + [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05},
                                   {"params": plain, "weight_decay": 0.0}],
                                  lr=options.rate, betas=(0.9, 0.98))
    held_out = [b for b, _ in zip(batches(vocabulary, 1000003, 8, 4), range(4))]  # other stories
    if rank == 0:
        print("%d tokens in the vocabulary, %.2f M weights" % (
            model.n_vocab, sum(p.numel() for p in model.parameters()) / 1e6), flush=True)
    start, n_tokens = time.time(), 0
    data = batches(vocabulary, options.seed + 17 + 1000 * rank, options.rows)
    for step in range(options.steps):
        done = step / options.steps
        slope = min(1, (step + 1) / 50) * (0.02 + 0.98 * min(1, 2.0 * (1 - done)))
        for group in optimizer.param_groups:
            group["lr"] = options.rate * slope
        batch = next(data)
        loss = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        for p in model.parameters():  # an expert may have got no token, the first time
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        average(model, n)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.balance(0.01 if done < 0.3 else 0.003 if done < 0.7 else 0.0005)
        n_tokens += n * int((batch[1] >= 0).sum())
        if rank == 0 and (step + 1) % 50 == 0:
            load = " ".join("%.2f-%.2f" % (l.min() / l.sum() * N_EXPERT, l.max() / l.sum() * N_EXPERT)
                            for l in model.load[1:])
            with torch.no_grad():
                held = sum(loss_of(model, b).item() for b in held_out) / len(held_out)
            print("step %d, %.1f min, %.2f M tokens, loss %.3f, held out %.3f, load %s" % (
                step + 1, (time.time() - start) / 60, n_tokens / 1e6, loss.item(), held, load),
                flush=True)
        if rank == 0 and ((step + 1) % 100 == 0 or step + 1 == options.steps):
            export(model, vocabulary, options.out)


def learn_vocabulary(seed):
    referred = [" " + word for word in words.GIRLS + words.BOYS + words.PETS]
    referred += [" " + part for word in words.ELDERS + words.THINGS for part in word.split()]
    merges = bpe.learn(grammar.stories(seed, 4000), N_MERGES, referred)
    return bpe.Vocabulary(merges, SPECIALS)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="storyteller-f32.gguf")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--rows", type=int, default=12, help="stories per step and process")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--start", help="a file to go on from: its vocabulary and weights")
    options = parser.parse_args()
    if options.start:
        vocabulary, weights = read(options.start)
    else:
        vocabulary, weights = learn_vocabulary(options.seed), None
    torch.multiprocessing.spawn(train, (options, vocabulary, weights), options.processes)


if __name__ == "__main__":
    main()
