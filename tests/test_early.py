"Early exit: equal to indexing the full forward; budgets kept, limits that hold; and files that cannot harm."

import itertools, json, math, subprocess, sys
from collections import Counter
from copy import deepcopy
import numpy as np
import pandas as pd
import pytest
from conftest import make_learner, small_digits, tiny_resnet
from fastai.vision.all import F, Learner, accuracy, load_learner, models, partial, resnet18, tensor, torch
from eed_fastai.all import *


def network(dtype=torch.float64, n_out=5):
    "In double precision, so that a score beside its threshold is on the same side whatever the batch"
    return multi_exit(tiny_resnet, n_out).to(dtype).eval()


def images(n, dtype=torch.float64, size=16):
    return torch.randn(n, 3, size, size, dtype=dtype)


def by_hand(z, thresholds, score):
    "Image by image: the first open exit that is sure enough"
    res = []
    for o in z:
        for i, t in enumerate([*thresholds, -math.inf]):
            if t > 1:
                continue
            seen = [j for j, u in enumerate([*thresholds, 0]) if j <= i and u <= 1]
            if i == len(thresholds) or score(o[None, seen]).item() >= t:
                res.append((i, o[i]))
                break
    return tensor([i for i, _ in res]), torch.stack([o for _, o in res]) if res else z[:, 0]


def sure_of_mean(z):
    return max_prob(z.mean(1, keepdim=True))


@pytest.mark.parametrize('score', [max_prob, margin, entropy, patience, sure_of_mean], ids=lambda f: f.__name__)
@pytest.mark.parametrize('b', [0, 1, 7, 130])
def test_early_exit_is_indexing_the_full_forward(score, b):
    model, x = network(), images(b)
    with torch.no_grad():
        z = model.all_exits(x).logits
    levels = [score(z[:, : i + 1]).median().item() if b else 0.5 for i in range(3)]
    for thresholds in (
        levels,
        [math.inf, *levels[1:]],
        [levels[0], 1.5, levels[2]],
        [levels[0], levels[1], 2.0],
        [0.0] * 3,
        [2.0] * 3,
    ):
        idx, out = by_hand(z, thresholds, score)
        for compact in (0.0, 1 / 16, 0.5, 2.0):
            mine, where = early_exit(model, x, thresholds, score, compact=compact)
            assert torch.equal(where, idx) and torch.allclose(mine, out, atol=1e-10) and mine.shape == (b, 5)
        assert torch.equal(exits_taken(z, thresholds, score), idx)


def test_a_large_batch_and_channels_last():
    model = network(torch.float32).to(memory_format=torch.channels_last)
    x = images(512, torch.float32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        z = model.all_exits(x).logits
    ts = [max_prob(z[:, : i + 1]).quantile(q).item() + 1e-5 for i, q in enumerate((0.5, 0.6, 0.7))]
    seen = []
    hook = model.stages[1].register_forward_pre_hook(
        lambda m, a: seen.append(a[0].is_contiguous(memory_format=torch.channels_last))
    )
    out, idx = early_exit(model, x, ts)
    hook.remove()
    assert seen == [True] and set(idx.tolist()) == {0, 1, 2, 3}  # the compacted batch keeps its memory format
    assert torch.allclose(out, z[range(512), idx], atol=1e-4)
    assert not out.requires_grad


def test_temperatures_divide_and_decide():
    model, x = network(), images(40)
    with torch.no_grad():
        z = model.all_exits(x).logits
    temps = [0.01, 0.5, 2.0, 3.0]
    ts = [max_prob(z[:, :1] / 0.01).median().item(), 2.0, 2.0]
    out, idx = early_exit(model, x, ts, temperatures=temps)
    scaled = z / torch.tensor(temps)[:, None]
    assert torch.equal(idx, exits_taken(scaled, ts)) and 0 < (idx == 0).sum() < 40
    assert torch.allclose(out, scaled[range(40), idx], atol=1e-9)


def test_modes_come_back_and_statistics_stay():
    model = network().train()
    model.stages[0].eval()
    modes, state = [m.training for m in model.modules()], deepcopy(model.state_dict())
    early_exit(model, images(9), [0.3, 0.3, 0.3])
    assert [m.training for m in model.modules()] == modes
    model.eval()
    model.stages[2].train()  # a part of a network that answers is left in training mode
    early_exit(model, images(9), [2.0, 2.0, 2.0])
    model.eval()
    next(m for m in model.stages[1].modules() if isinstance(m, torch.nn.BatchNorm2d)).train()
    early_exit(model, images(9), [0.3, 0.3, 0.3])
    model.eval()
    model.heads[0] = deepcopy(model.heads[0]).train()  # … or replaced
    early_exit(model, images(9), [0.3, 0.3, 0.3])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_what_the_heads_gave_is_not_written_over():
    model, x, kept = network(), images(32), []
    with torch.no_grad():
        z = model.all_exits(x).logits
    model.heads[0].register_forward_hook(lambda m, a, out: kept.append(out[0]))
    where = early_exit(model, x, [max_prob(z[:, :1]).median().item(), 0.0, 2.0])[1]
    assert set(where.tolist()) == {0, 1} and torch.equal(kept[0], z[:, 0])


def test_skipped_work_is_not_done():
    model, x, n = network(), images(32), Counter()
    for kind, ms in (('stage', model.stages), ('head', model.heads)):
        for i, m in enumerate(ms):
            m.register_forward_pre_hook(lambda m, a, name=f'{kind}{i}': n.update({name: len(a[0])}))
    score = lambda z: (torch.arange(len(z)) < 8).double() if z.shape[1] == 1 else torch.zeros(len(z))
    early_exit(model, x, [1.0, 2.0, 1.0], score)
    assert n == dict(stage0=32, head0=32, stage1=24, stage2=24, head2=24, stage3=24, head3=24)
    n.clear()
    early_exit(model, x, [1.0, 2.0, 1.0], score, compact=0.5)  # a quarter is gone, but half would be needed
    assert n['stage1'] == n['head3'] == 32


def test_half_precision_keeps_the_policy():
    "In bfloat16 all probabilities above 0.998 are 1; scores are taken in float32"
    model, x = network(torch.bfloat16), images(64, torch.bfloat16)
    model.heads[0].fc.weight.data *= 200
    with torch.no_grad():
        z = model.all_exits(x).logits
    idx = early_exit(model, x, [0.9999, 2.0, 2.0])[1]
    assert torch.equal(idx, exits_taken(z.float(), [0.9999, 2.0, 2.0])) and 0 < (idx == 0).sum() < 64


@pytest.mark.parametrize(
    'bad,said',
    [
        (dict(thresholds=[0.5]), 'needs 3 numbers'),
        (dict(thresholds=[0.5, math.nan, 0.5]), 'needs 3 numbers'),
        (dict(thresholds=[0.5] * 3, temperatures=[1.0]), 'temperatures'),
        (dict(thresholds=[0.5] * 3, score=lambda z: z.mean()), 'one number for each image'),
    ],
)
def test_bad_input(bad, said):
    with pytest.raises(ValueError, match=said):
        early_exit(network(), images(4), **bad)


# --- budgets --------------------------------------------------------------------------------------------------------


def world(n=3000, seed=0, k=4, c=10):
    "Logits of k exits, later ones better, and classes; what is right more often is also surer"
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(c, (n,), generator=g)
    z = torch.randn(n, k, c, generator=g, dtype=torch.float64)
    z += F.one_hot(y, c)[:, None] * torch.linspace(1.5, 3.5, k)[:, None]
    return z, y


parts = pd.DataFrame(
    dict(stage=[3.0, 2.0, 2.0, 3.0], head=[0.8, 0.6, 0.4, 0.1]), index=['exit0', 'exit1', 'exit2', 'main']
)


def msdnet_loops(s, shares):
    "The budgeted protocol as its authors wrote it: samples in order of their score, in Python loops"
    n, left, res = len(s), set(), []
    for m in range(s.shape[1]):
        want, order, count, t = math.floor(n * shares[m]), s[:, m].argsort(descending=True).tolist(), 0, math.inf
        for j in order:
            if j in left:
                continue
            count += 1
            if count == want:
                t = s[j, m].item()
                break
        res.append(t)
        left |= {j for j in range(n) if j not in left and s[j, m] >= t}
    return res


def test_msdnets_protocol():
    z, _ = world(400)
    s = torch.stack([max_prob(z[:, : i + 1]) for i in range(3)], 1)
    for r in (0.3, 0.7, 1.0, 1.6):
        p = r ** np.arange(1, 5)
        assert share_thresholds(s, p / p.sum()) == msdnet_loops(s, p / p.sum())


def test_walk_costs_by_hand():
    for ts in itertools.product([0.5, 2.0], repeat=3):
        for i, c in enumerate(walk_costs(parts, ts)):
            passed = sum(parts['head'].iloc[j] for j in range(i) if ts[j] <= 1)
            assert c == pytest.approx(parts['stage'].iloc[: i + 1].sum() + passed + parts['head'].iloc[i])


@pytest.mark.parametrize('score', [max_prob, margin, entropy, patience], ids=lambda f: f.__name__)
def test_budgets_are_kept_and_used(score):
    z, y = world()
    acc = []
    for budget in (4.0, 5.0, 6.0, 8.0, 10.1):
        ts = exit_thresholds(z, y, parts, budget, score=score)
        r = policy_result(z, y, ts, parts, score)
        idx, _ = by_hand(z[:300], ts, score)
        assert torch.equal(exits_taken(z[:300], ts, score), idx)
        assert r['cost'] <= budget + 1e-9
        acc.append(r['accuracy'])
    assert acc == sorted(acc) and acc[-1] >= r['main']
    geometric = [
        policy_result(z, y, exit_thresholds(z, y, parts, b, family=geometric_shares), parts)['accuracy']
        for b in (5.0, 6.0, 8.0)
    ]
    if score is max_prob:
        assert np.allclose(geometric, acc[1:4], atol=0.02)  # MSDNet's family finds much the same


def test_the_limit_of_a_loss_holds():
    "Over many small samples the true loss of the thresholds that were chosen exceeds `drop` in at most 5 %"
    z, y = world(60000, seed=1)
    bad = 0
    for seed in range(40):
        rows = torch.randint(len(z), (400,), generator=torch.Generator().manual_seed(seed))
        ts = exit_thresholds(z[rows], y[rows], parts, drop=0.03)
        r = policy_result(z, y, ts, parts)
        bad += r['main'] - r['accuracy'] > 0.03
    assert bad <= 5  # 2 expected at most; P(more than 5) is 1 %
    assert exit_thresholds(z, y, parts, drop=0.03) != [math.inf] * 3


def test_a_dear_exit_stays_closed():
    z, y = world()
    dear = parts.assign(head=[0.8, 6.0, 0.4, 0.1])
    with pytest.warns(UserWarning, match='exit1'):
        ts = exit_thresholds(z, y, dear, 6.0)
    assert ts[1] > 1


def test_curves_by_hand():
    z, y = world(600)
    anytime = anytime_curve(z, y, parts)
    assert anytime.accuracy.tolist() == pytest.approx(
        [(z[:, i].argmax(1) == y).double().mean().item() for i in range(4)], abs=1e-6
    )
    assert anytime.ensemble_accuracy.tolist() == pytest.approx(
        [(z[:, : i + 1].mean(1).argmax(1) == y).double().mean().item() for i in range(4)], abs=1e-6
    )
    assert anytime.cost.tolist() == pytest.approx(
        [3.8, 5.6, 7.4, 10.1]
    ) and anytime.ensemble_cost.tolist() == pytest.approx([3.8, 6.4, 8.8, 11.9])
    curve = budgeted_curve((z[:300], y[:300]), (z[300:], y[300:]), parts, n=6)
    assert (
        curve.target.is_monotonic_increasing
        and curve.target.iloc[-1] == pytest.approx(10.1)
        and curve.accuracy.iloc[-1] > curve.accuracy.iloc[0]
    )
    for r in curve.itertuples():
        idx, out = by_hand(z[300:], r.thresholds, max_prob)  # on the images that judge
        assert r.accuracy == pytest.approx((out.argmax(1) == y[300:]).double().mean().item(), abs=1e-6)
        assert r.cost == pytest.approx(walk_costs(parts, r.thresholds)[idx].mean(), rel=1e-5)
        assert policy_result(z[:300], y[:300], r.thresholds, parts)['cost'] <= r.target + 1e-9  # on those that chose
    lines = plot_early(anytime, curve).get_lines()
    assert [o.get_ydata().tolist() for o in lines] == [
        anytime.accuracy.tolist(),
        anytime.ensemble_accuracy.tolist(),
        curve.accuracy.tolist(),
    ]


def test_reliability_is_counted():
    "As sure as right: on the diagonal; five times as sure: below it"
    said = 2 * torch.randn(4000, 5, generator=torch.Generator().manual_seed(0))
    y = said.softmax(1).multinomial(1, generator=torch.Generator().manual_seed(1))[:, 0]
    good, sure, _ = plot_reliability(torch.stack([said, 5 * said], 1), y).get_lines()
    assert (
        len(good.get_xdata()) == 10
        and np.abs(good.get_xdata() - good.get_ydata()).max() < 0.08
        and (sure.get_xdata() - sure.get_ydata()).mean() > 0.1
    )


def test_pictures_of_who_left(trained):
    policy = trained.fit_policy(budget=0.7)
    fig, (_, _, idx) = trained.show_early(n=3, policy=policy), trained.predict_early(policy=policy)
    shown = [sum(len(ax.images) for ax in fig.axes[3 * i : 3 * i + 3]) for i in range(4)]
    assert shown == [min(3, (idx == i).sum().item()) for i in range(4)] and max(shown) == 3


def test_temperatures_against_a_grid():
    z, y = world(1000)
    for i, t in enumerate(fit_temperatures(z * tensor([1.0, 2.0, 0.5, 3.0])[:, None], y)):
        o = z[:, i] * [1.0, 2.0, 0.5, 3.0][i]
        grid = np.exp(np.linspace(-2, 2, 2001))
        assert t == pytest.approx(
            grid[np.argmin([F.cross_entropy(o / g, y).item() for g in grid[::20]]) * 20], rel=0.05
        )


# --- in a Learner ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained():
    learn = Learner(small_digits(400), multi_exit(tiny_resnet), metrics=accuracy, cbs=EEDCallback())
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3, 1e-2)
    return learn


@pytest.mark.parametrize(
    'kw',
    [
        dict(budget=0.7),
        dict(ms=1e3),
        dict(drop=0.2),
        dict(budget=0.7, score=patience, calibrate=False),
        dict(budget=0.9, family=geometric_shares),
    ],
    ids='-'.join,
)
def test_fit_and_predict(trained, kw):
    policy = trained.fit_policy(**kw)
    p, y, idx = trained.predict_early()
    z, targs = trained.exit_logits()
    z = policy.scaled(z)
    where = exits_taken(z, policy.thresholds, policy.score)
    assert (idx == where).float().mean() > 0.98 and torch.equal(y, targs)  # float32: a score may lie on its threshold
    same = idx == where
    assert torch.allclose(p[same], z[range(len(z)), where].softmax(-1)[same], atol=1e-4)
    r = policy.report
    assert r.images.sum() == len(y) and ((r.filter(like='left_').sum(1) - 1).abs() < 1e-6).all()
    if 'ms' in kw:
        assert r.measured_ms.reported > 0
    assert (p.argmax(1) == y).float().mean().item() == pytest.approx(r.accuracy.mean(), abs=0.02)


def test_the_learner_is_left_alone(trained):
    model, cbs, metrics = trained.model, list(trained.cbs), list(trained.metrics)
    trained.predict_early(policy=ExitPolicy([0.5] * 3))
    assert trained.model is model and set(map(type, trained.cbs)) == set(map(type, cbs))
    before = trained.validate()
    trained.predict_early(policy=ExitPolicy([0.5] * 3))
    assert np.allclose(before, trained.validate())


def test_own_metrics_and_an_ensemble_do_not_mind():
    learn = make_learner([EEDCallback(), EnsemblePreds()], metrics=[accuracy, EnsembleMetric(accuracy, 'mine')])
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    p, y, idx = learn.predict_early(policy=ExitPolicy([0.3] * 3))
    assert (
        len(p) == len(idx) == len(y)
        and [m.name for m in learn.metrics].count('mine') == 1
        and learn._grab_cbs(EnsemblePreds)
    )


def test_a_policy_goes_with_an_exported_learner(trained, tmp_path):
    trained.policy = ExitPolicy([0.5] * 3)
    trained.export(tmp_path / 'l.pkl')
    again = load_learner(tmp_path / 'l.pkl')
    dl = again.dls.test_dl([x for x, _ in trained.dls.valid_ds.items[:4]])
    a, b = again.predict_early(dl=dl), trained.predict_early(dl=dl)
    assert torch.allclose(a[0], b[0], atol=1e-5) and torch.equal(a[2], b[2])


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arch,kw',
    [
        (tiny_resnet, {}),
        (resnet18, {}),
        (partial(models.vgg11_bn), dict(cuts=None)),
        (tiny_resnet, dict(head=BottleneckHead)),
        (tiny_resnet, dict(cuts=['layer2', 'layer3'])),
        (tiny_resnet, dict(n_in=1)),
        (partial(models.mobilenet_v3_small), dict(head=SeparableHead, n_exits=3)),
        (models.resnet50, dict(n_exits=2)),
        ('convnextv2_atto', {}),
    ],
    ids=['cifar', 'torchvision', 'vgg', 'bottleneck', 'cuts', 'grey', 'fewer', 'wide', 'timm'],
)
def test_saved_and_loaded(arch, kw, tmp_path):
    model = multi_exit(arch, 7, **kw).eval()
    again = load_multi_exit(save_multi_exit(model, tmp_path / 'm'))
    x = torch.randn(2, model.n_in, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.all_exits(x).logits, again.all_exits(x).logits)
    assert (
        sorted(o.name for o in (tmp_path / 'm').iterdir()) == ['config.json', 'model.safetensors']
        and len(list(tmp_path.iterdir())) == 1
    )


@pytest.mark.parametrize('field', ['cuts', 'costs'])
def test_deep_nesting_is_an_error_that_says_so(field, tmp_path):
    folder = save_multi_exit(multi_exit(tiny_resnet, 3), tmp_path / 'm')
    text = json.loads((folder / 'config.json').read_text())
    for depth in (10, 200, *range(940, 1010), 5000):
        (folder / 'config.json').write_text(
            json.dumps({**text, field: 0}).replace(f'"{field}": 0', f'"{field}": ' + '[' * depth + ']' * depth)
        )
        with pytest.raises(ValueError):
            read_config(folder)


@pytest.mark.parametrize('begins', [b'\x80', b'PK'])
def test_a_good_file_may_begin_like_a_pickle(begins, tmp_path):
    "Its first eight bytes are the length of what follows, which may be any"
    from safetensors.torch import save
    from eed_fastai.save import _read_weights
    from eed_fastai.config import sha256_of

    data = next(d for n in range(2**15) if (d := save({'w' * n: torch.ones(2)})).startswith(begins))
    (tmp_path / 'model.safetensors').write_bytes(data)
    assert [v.tolist() for v in _read_weights(tmp_path, dict(sha256=sha256_of(data))).values()] == [[1.0, 1.0]]


def test_a_trained_learner_with_a_method(trained, tmp_path):
    "What a method remembers is not part of what answers"
    learn = make_learner(EEDCallback(**recipes['mate_style']))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    again = load_multi_exit(save_multi_exit(learn.model, tmp_path / 'm', classes=learn.dls.vocab))
    assert not any(k.startswith('method') for k in again.state_dict())


def test_saving_over_a_network_never_leaves_half(tmp_path, monkeypatch):
    save_multi_exit(multi_exit(tiny_resnet, 3), tmp_path / 'm')
    before = (tmp_path / 'm/config.json').read_bytes()
    monkeypatch.setattr('eed_fastai.save._compare', lambda *_: (_ for _ in ()).throw(ValueError('no')))
    with pytest.raises(ValueError):
        save_multi_exit(multi_exit(tiny_resnet, 4), tmp_path / 'm')
    assert (tmp_path / 'm/config.json').read_bytes() == before and load_multi_exit(tmp_path / 'm').n_out == 3
    assert [o.name for o in tmp_path.iterdir()] == ['m']


def test_the_runtime_needs_no_torch(tmp_path):
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model = network(torch.float32)
    folder = export_onnx(model, tmp_path / 'onnx', 16, ExitPolicy([0.25, 0.3, math.inf], margin))
    x = images(20, torch.float32)
    np.save(tmp_path / 'x.npy', x.numpy())
    code = """
import sys, numpy as np
sys.modules['torch'] = sys.modules['eed_fastai'] = None
from runtime import OnnxExits
z, i = OnnxExits('.')(np.load('../x.npy'))
np.savez('../out.npz', z=z, i=i)
"""
    r = subprocess.run([sys.executable, '-c', code], cwd=folder, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    out, (z, i) = np.load(tmp_path / 'out.npz'), early_exit(model, x, [0.25, 0.3, math.inf], margin)
    assert (out['i'] == i.numpy()).all() and np.abs(out['z'] - z.numpy()).max() < 1e-4
