"""PyTorch's ways, timed in a process of its own that is asked for one shape after another.

    python benchmarks/torch_sliding.py [THREADS]

reads lines `way cell B D H window steps` and answers each with seconds per step. The ways:

* sliding: the loop of the PyTorch forum's recipe for windows (k1 = 1, k2 = window), every
  step's graph retained and walked back by hand. An optimiser that steps in place makes
  PyTorch raise there, so parameters are changed behind autograd's back, through `.data`.
* chunks: `nn.LSTM` or `nn.GRU` over `window` steps and one backward pass for each.
* ignite: the same by Ignite's trainer for truncated backpropagation.
* snntorch: its `backprop.TBPTT` on recurrent leaky neurons. It raises on input that varies in time
  (UnboundLocalError, version 1.0.0), so it gets one that doesn't.

Where Ignite or snnTorch is not installed the answer is nan.
"""

import sys
import time
import warnings

import torch

RATE = 1e-4
PARTS = {"LSTM": 2, "GRU": 1}  # of the state


def now():
    """The time when all that was asked of a GPU is done."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def whole(state):
    """The state as its cell takes it: a GRU's is no tuple."""
    return state if len(state) > 1 else state[0]


def parts(state):
    """The state as a tuple."""
    return state if isinstance(state, tuple) else (state,)


def sliding(name, batch, inputs, hidden, window, steps):
    """Seconds per step, an SGD update at every one."""
    cell, xs = getattr(torch.nn, f"{name}Cell")(inputs, hidden), torch.randn(steps, batch, inputs)
    states = [(None, tuple(torch.zeros(batch, hidden) for _ in range(PARTS[name])))]
    start = None
    for t, x in enumerate(xs):
        if t == min(2 * window, steps // 2):
            start = now(), t
        before = tuple(v.detach().requires_grad_() for v in states[-1][1])
        states.append((before, parts(cell(x, whole(before)))))
        states = states[-window:]
        cell.zero_grad()
        loss = ((states[-1][1][0] - 0.1) ** 2).mean()
        loss.backward(retain_graph=True)
        for k in range(len(states) - 1, 0, -1):
            if states[k][0] is None or states[k - 1][0] is None:
                break
            cts = tuple(v.grad for v in states[k][0])
            torch.autograd.backward(states[k - 1][1], cts, retain_graph=True)
        for old, _ in states:
            for v in old or ():
                v.grad = None
        for parameter in cell.parameters():
            parameter.data -= RATE * parameter.grad
    return (now() - start[0]) / (steps - start[1])


def chunks(name, batch, inputs, hidden, window, steps):
    """Seconds per step, an SGD update for every chunk."""
    model, xs = getattr(torch.nn, name)(inputs, hidden), torch.randn(steps, batch, inputs)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    state = whole(tuple(torch.zeros(1, batch, hidden) for _ in range(PARTS[name])))
    start = None
    for t in range(0, steps - window + 1, window):
        if t == window:
            start = now(), t
        ys, state = model(xs[t : t + window], whole(tuple(v.detach() for v in parts(state))))
        optimizer.zero_grad()
        ((ys - 0.1) ** 2).mean(dim=(1, 2)).sum().backward()
        optimizer.step()
    return (now() - start[0]) / (t + window - start[1])


def ignite(name, batch, inputs, hidden, window, steps):
    """Seconds per step, an SGD update for every chunk."""
    from ignite.contrib.engines.tbptt import create_supervised_tbptt_trainer

    model = getattr(torch.nn, name)(inputs, hidden)
    trainer = create_supervised_tbptt_trainer(
        model,
        torch.optim.SGD(model.parameters(), RATE),
        lambda ys, targets: ((ys - targets) ** 2).mean(dim=(1, 2)).sum(),
        window,
    )
    steps -= steps % window
    data = [(torch.randn(steps, batch, inputs), torch.full((steps, batch, hidden), 0.1))]
    return of_second_run(lambda: trainer.run(data, max_epochs=1)) / steps


def snntorch(name, batch, inputs, hidden, window, steps):
    """Seconds per step, an SGD update for every chunk."""
    del name  # it has its own
    warnings.simplefilter("ignore")  # it says of itself that it will go
    import snntorch as snn
    from snntorch import backprop, functional

    neurons = snn.RLeaky(0.9, linear_features=hidden, init_hidden=True, output=True)
    model = torch.nn.Sequential(torch.nn.Linear(inputs, hidden), neurons)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    steps -= steps % window
    data = [(torch.randn(batch, inputs), torch.zeros(batch, dtype=torch.long))]
    loss = functional.mse_count_loss()
    settings = {"num_steps": steps, "time_var": False, "K": window}
    return of_second_run(lambda: backprop.TBPTT(model, data, optimizer, loss, **settings)) / steps


def of_second_run(run):
    """Seconds that it takes once warm."""
    run()
    start = now()
    run()
    return now() - start


WAYS = {"sliding": sliding, "chunks": chunks, "ignite": ignite, "snntorch": snntorch}


def main():
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    print(torch.__version__, flush=True)
    for line in sys.stdin:
        way, name, *numbers = line.split()
        try:
            print(WAYS[way](name, *map(int, numbers)), flush=True)
        except ImportError:
            print("nan", flush=True)


if __name__ == "__main__":
    main()
