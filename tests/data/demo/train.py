"""Trains the demo model; gguf_file.py writes it as a GGUF.

    python train.py --minutes 70 --work OUT        # OUT/tokens.json, OUT/last.pt, OUT/loss.csv; then gguf_file.py

One idea: the schedule follows the clock, not the step count, so a run ends when it is told to on any machine; from --qat-from
of the time on, the weights are used as their storage rounds them. Each thread is a process of its own that works on its own
rows; gradients are averaged once a step, which suffers less on a busy machine than threads that meet in every operation.
Evaluation of the file is in eval.py.
"""
import argparse
import csv
import datetime
import json
import math
import os
import random
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import corpus
import model as M
import tokens as T

ROWS, ROW, LONG = 3, 192, 1536     # tokens a step and process: three rows of packed conversations; now and then one long row
LR, WARMUP, QAT_FROM, SEED = 2e-3, 60, 0.4, 7
PROSE = 0.10


def vocabulary(work):
    path = os.path.join(work, "tokens.json")
    if not os.path.exists(path):
        tokens, merges = T.train(T.training_text())
        json.dump(dict(tokens=tokens, merges=merges), open(path, "w"), ensure_ascii=False)
    saved = json.load(open(path))
    return T.Tokens(saved["tokens"], [tuple(m) for m in saved["merges"]])


def documents(c, toks, r):
    while True:
        if r.random() < PROSE:
            ids = [T.BOS] + toks.hf.encode(c.prose(r), add_special_tokens=False).ids + [T.EOS]
            yield ids, [False] + [True] * (len(ids) - 1)
        else:
            yield toks.chat(c.conversation(r))


def batches(c, toks, r):
    """(tokens, positions, document, learn) arrays of packed documents; learn[i]: token i is to be predicted."""
    source = documents(c, toks, r)
    while True:
        rows, n = (1, LONG) if r.random() < 0.015 else (ROWS, ROW)
        a = np.zeros((4, rows, n + 1), np.int64)
        for row in range(rows):
            at, doc = 0, 0
            while at <= n:
                ids, learn = next(source)
                if n == LONG:                      # the long row is one long conversation
                    while len(ids) < n:
                        more, say = next(source)
                        if say[1]:
                            continue               # plain text does not belong into a conversation
                        ids, learn = ids + more[1:], learn + say[1:]
                m = min(len(ids), n + 1 - at)
                a[0, row, at:at + m] = ids[:m]
                a[1, row, at:at + m] = range(m)
                a[2, row, at:at + m] = doc
                a[3, row, at:at + m] = learn[:m]
                at, doc = at + m, doc + 1
        yield torch.from_numpy(a)


def loss_of(p, a):
    tokens, positions, doc, learn = a
    y = M.hidden(p, tokens[:, :-1], positions[:, :-1], M.masks(positions[:, :-1], doc[:, :-1]))
    pick = (learn[:, 1:] == 1) & (doc[:, 1:] == doc[:, :-1])
    return F.cross_entropy(M.logits(p, y[pick]), tokens[:, 1:][pick])


def answer_scores(p, toks, rows, size=32):
    """Teacher-forced over (question, answer): (mean loss, one bool a row: greedy decoding gives exactly the answer)."""
    items = []
    for row in rows:
        ids, learn = toks.chat([("user", row["question"]), ("model", row["answer"])])
        items.append((ids[:-1], learn[:-1]))           # without the newline after the turn
    order = sorted(range(len(items)), key=lambda i: len(items[i][0]))
    exact, total, count = [False] * len(items), 0.0, 0
    with torch.no_grad():
        for start in range(0, len(order), size):
            part = order[start:start + size]
            n = max(len(items[i][0]) for i in part)
            ids, learn = torch.zeros(len(part), n, dtype=torch.long), torch.zeros(len(part), n, dtype=torch.bool)
            for k, i in enumerate(part):
                ids[k, :len(items[i][0])] = torch.tensor(items[i][0])
                learn[k, :len(items[i][0])] = torch.tensor(items[i][1])
            pos = torch.arange(n)[None].expand(len(part), -1)
            out = M.logits(p, M.hidden(p, ids, pos, M.masks(pos, torch.zeros_like(ids))))[:, :-1]
            want, pick = ids[:, 1:], learn[:, 1:]
            total += F.cross_entropy(out[pick], want[pick], reduction="sum").item()
            count += int(pick.sum())
            good = ((out.argmax(-1) == want) | ~pick).all(1)
            for k, i in enumerate(part):
                exact[i] = bool(good[k])
    return total / count, exact


def work(rank, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + os.path.abspath(os.path.join(args.work, "meet")), rank=rank,
                            world_size=args.threads, timeout=datetime.timedelta(hours=2))
    toks = vocabulary(args.work)
    c, r = corpus.Corpus(), random.Random(SEED + rank + 100 * args.resume)
    held = c.heldout()
    probe = random.Random(1).sample(held, 160) + random.Random(2).sample([x for x in held if x["kind"] == "new"], 100)
    last = os.path.join(args.work, "last.pt")
    params = torch.load(last) if args.resume else M.fresh(SEED)
    params = {k: v.requires_grad_() for k, v in params.items()}
    matrices = [p for p in params.values() if p.dim() == 2]
    rest = [p for p in params.values() if p.dim() == 1]
    opt = torch.optim.AdamW([dict(params=matrices, weight_decay=0.05), dict(params=rest, weight_decay=0.0)], lr=LR, betas=(0.9, 0.98), fused=True)
    if rank == 0:
        print(sum(p.numel() for p in params.values()), "parameters", flush=True)
        log = open(os.path.join(args.work, "loss.csv"), "w")
        table = csv.writer(log)
        table.writerow(["minutes", "steps", "tokens", "qat", "lr", "train_loss", "heldout_loss", "heldout_variant_exact", "heldout_new_exact"])
    start, step, seen, mean, next_probe, lr = time.time(), 0, 0, None, 120.0, 0.0
    source = batches(c, toks, r)
    clock = torch.zeros(1)
    while True:
        clock[0] = (time.time() - start) / (60 * args.minutes)
        dist.broadcast(clock, 0)                       # one clock, so that all processes take the same turns
        t = clock.item()
        done, qat = t >= 1, t >= args.qat_from
        if rank == 0 and (done or time.time() - start > next_probe):
            next_probe = time.time() - start + 300
            torch.save({k: v.detach().clone() for k, v in params.items()}, last)
            p = M.stored(params) if qat else params
            l, exact = answer_scores({k: v.detach() for k, v in p.items()}, toks, probe)
            share = {k: np.mean([e for e, x in zip(exact, probe) if x["kind"] == k]) for k in ("variant", "new")}
            table.writerow([f"{t * args.minutes:.1f}", step, seen, int(qat), f"{lr:.2e}", f"{mean:.4f}", f"{l:.4f}",
                            f"{share['variant']:.3f}", f"{share['new']:.3f}"])
            log.flush()
        if done:
            break
        lr = args.lr * min(1, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * t)))
        for g in opt.param_groups:
            g["lr"] = lr
        a = next(source)
        loss = loss_of(M.stored(params) if qat else params, a)
        loss.backward()
        flat = torch.cat([p.grad.view(-1) for p in params.values()] + [loss.detach().view(1)])
        dist.all_reduce(flat)
        flat /= args.threads
        at = 0
        for p in params.values():
            p.grad.copy_(flat[at:at + p.numel()].view_as(p))
            at += p.numel()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + args.threads * a.shape[1] * (a.shape[2] - 1)
        now = flat[-1].item()
        mean = now if mean is None else 0.98 * mean + 0.02 * now
        if rank == 0 and step % 50 == 0:
            print(f"{step} {time.time() - start:.0f}s {seen} tokens lr {lr:.2e} loss {mean:.4f}", flush=True)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--minutes", type=float, default=70)
    ap.add_argument("--work", default="demo-work")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--lr", type=float, default=LR)
    ap.add_argument("--qat-from", type=float, default=QAT_FROM)
    ap.add_argument("--resume", action="store_true", help="start from OUT/last.pt instead of fresh parameters")
    args = ap.parse_args()
    os.makedirs(args.work, exist_ok=True)
    meet = os.path.join(args.work, "meet")
    if os.path.exists(meet):
        os.remove(meet)
    vocabulary(args.work)
    torch.multiprocessing.spawn(work, (args,), args.threads)


if __name__ == "__main__":
    main()
