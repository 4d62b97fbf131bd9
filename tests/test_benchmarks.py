"The benchmark scripts, on a data set small enough for a test, and the rows that are committed."

import os, pickle, subprocess, sys
import pytest
from conftest import *

root = Path(__file__).resolve().parent.parent
pytest.importorskip('torchmetrics', reason="torchmetrics is an extra: pip install 'eed_fastai[bench]'")

sys.path.insert(0, str(root / 'benchmarks'))
import cifar100, imagenet, speed

cifar = Path(os.environ.get('EED_CIFAR100') or root / 'data' / 'cifar100')


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    "Ten classes of CIFAR-100's form, 60 training and 4 test images each, as pickles"
    d, rng = tmp_path_factory.mktemp('cifar100'), np.random.default_rng(0)
    for part, n in (('train', 60), ('test', 4)):
        y = rng.permutation(np.repeat(np.arange(10), n))
        x = rng.integers(0, 256, (len(y), 3072)).astype(np.uint8) // 2 + (y[:, None] * 12).astype(
            np.uint8
        )  # darker and lighter classes
        (d / part).write_bytes(pickle.dumps({b'data': x, b'fine_labels': y.tolist()}, protocol=2))
    (d / 'meta').write_bytes(pickle.dumps({b'fine_label_names': [f'class{i}'.encode() for i in range(10)]}, protocol=2))
    return d


def run(*args, ok=True):
    "What the command prints"
    res = subprocess.run(
        [sys.executable, root / 'benchmarks' / 'cifar100.py', *map(str, args)], capture_output=True, text=True, cwd=root
    )
    assert (res.returncode == 0) == ok, res.stdout + res.stderr
    return res.stdout + res.stderr


small = ('--width', 8, '--bs', 64, '--threads', 2)


def test_rows_curves_and_bits(data, tmp_path):
    args = ('--data', data, '--recipe', 'plain,eed_kl', '--epochs', 2, '--seeds', '0,1', '--results', tmp_path, *small)
    run(*args)
    df = pd.read_csv(tmp_path / 'cifar100.csv')
    assert list(df.columns) == cifar100.columns
    assert (
        df.recipe.tolist() == ['plain', 'eed_kl'] * 2
        and df.seed.tolist() == [0, 0, 1, 1]
        and (df.n_train == 600).all()
        and (df.n_judge == 40).all()
        and (df.protocol == 'report').all()
    )
    assert (
        df[['seconds', 'peak_memory', 'commit', 'hardware', 'torch', 'fastai', 'nll_main', 'ece_main', 'best_main']]
        .notna()
        .all()
        .all()
    )
    plain, eed = df.iloc[0], df.iloc[1]
    assert plain[['exit0', 'ensemble', 'nll_exit0']].isna().all() and eed[cifar100.exits].notna().all()
    for row in (plain, eed):
        curve = pd.read_csv(tmp_path / 'history' / f'{row.run}.csv')
        assert len(curve) == 2 and abs(100 * curve.accuracy.iloc[-1] - row.main) < 1e-3  # the last epoch is the figure
        bits = np.load(tmp_path / 'bits' / f'{row.run}.npz')
        assert set(bits) == ({'main'} if row.recipe == 'plain' else set(cifar100.exits))
        for name in bits:
            assert abs(np.unpackbits(bits[name])[:40].mean() * 100 - row[name]) < 1e-3
        logits = np.load(tmp_path / 'logits' / f'{row.run}.npz')
        assert set(logits) == {'y', *bits} - {'ensemble'} and logits['main'].dtype == np.float16
        for name in set(logits) - {'y'}:
            assert abs((logits[name].argmax(1) == logits['y']).mean() * 100 - row[name]) < 1e-3
    assert plain[['train_exit0', 'train_ensemble']].isna().all() and eed[cifar100.train_columns].between(0, 100).all()
    assert 'there already' in run(*args) and len(pd.read_csv(tmp_path / 'cifar100.csv')) == 4  # nothing is run twice
    out = run('--summary', '--results', tmp_path)
    assert 'main − plain' in out and '(2)' in out
    out = run('--table', 1, '--results', tmp_path)
    assert 'not yet run' in out and '77.71' in out  # a narrow network is no row of the paper's table


def test_a_cut_run_goes_on_as_if_nothing_had_happened(data, tmp_path):
    dls = cifar100.get_dls(data, 'cifar100', 'report', 64, torch.device('cpu'))
    o = SimpleNamespace(
        data=data,
        dataset='cifar100',
        network='resnet18',
        width=8,
        recipe='eed_mse',
        protocol='report',
        schedule='one_cycle',
        epochs=3,
        seed=0,
        lr=0.1,
        wd=5e-4,
        bs=64,
        nesterov=False,
        amp=None,
        channels_last=False,
        compile=False,
        device=torch.device('cpu'),
        results=tmp_path / 'a',
        every=1,
        judge_every=1,
    )
    whole, cut = (SimpleNamespace(**{**vars(o), 'results': tmp_path / k}) for k in 'ab')
    cifar100.train(whole)

    class Cut(Exception):
        pass

    class CutAt(cifar100.Checkpoint):
        def after_epoch(self):
            super().after_epoch()
            if self.epoch == 1:
                raise Cut('here')

    original, cifar100.Checkpoint = cifar100.Checkpoint, CutAt
    try:
        with pytest.raises(Cut):
            cifar100.train(cut)
    finally:
        cifar100.Checkpoint = original
    assert list((tmp_path / 'b' / 'checkpoints').iterdir()) and not (tmp_path / 'b' / 'cifar100.csv').exists()
    cifar100.train(cut)
    a, b = (pd.read_csv(tmp_path / k / 'cifar100.csv').iloc[0] for k in 'ab')
    assert (a[cifar100.exits] == b[cifar100.exits]).all() and a.nll_main == b.nll_main and a.run == b.run
    curves = [pd.read_csv(next((tmp_path / k / 'history').iterdir())).drop(columns='seconds') for k in 'ab']
    assert curves[0].equals(curves[1]) and not list((tmp_path / 'b' / 'checkpoints').iterdir())


def test_select_leaves_the_test_images_alone(data):
    train, test, vocab, is_val = cifar100.load(data, 'cifar100')
    dls = cifar100.get_dls(data, 'cifar100', 'select', 64, torch.device('cpu'))
    assert is_val.sum() == 500 and len(dls.valid_ds) == 500 and len(dls.train_ds) == 100
    seen = {x.tobytes() for ds in (dls.train_ds, dls.valid_ds) for x, _ in ds.items}
    assert len(seen) == 600 and not seen & {x.tobytes() for x in test[0]} and seen == {x.tobytes() for x in train[0]}


def test_train_accuracy_is_of_unaugmented_images(data):
    dls = cifar100.get_dls(data, 'cifar100', 'report', 64, torch.device('cpu'))
    learn = Learner(dls, multi_exit(tiny_resnet, n_out=10), cbs=EEDCallback())
    got = cifar100.train_accuracies(learn, 'eed_mse')
    train, *_ = cifar100.load(data, 'cifar100')
    x = (
        torch.tensor(train[0]).permute(0, 3, 1, 2) / 255 - torch.tensor(cifar100_stats[0])[:, None, None]
    ) / torch.tensor(cifar100_stats[1])[:, None, None]
    with torch.no_grad():
        z = learn.model.eval().all_exits(x).logits
    right = (z.argmax(-1) == torch.tensor(train[1])[:, None]).float().mean(0) * 100
    assert (
        np.allclose([got[f'train_{e}'] for e in cifar100.exits[:-1]], right, atol=0.2)
        and list(got) == cifar100.train_columns
    )


def test_parts_of_the_training_images(data):
    for task, n in (('cifar100-100x100', 60), ('cifar100-100x25', 25)):
        train, test, vocab, _ = cifar100.load(data, task)
        assert len(vocab) == 10 and np.bincount(train[1]).tolist() == [n] * 10 and len(test[1]) == 40


def test_small_task_is_every_fifth_class_and_its_first_hundred(data):
    train, test, vocab, _ = cifar100.load(data, 'cifar100-20x100')
    assert (
        vocab == ['class0', 'class5']
        and np.bincount(train[1]).tolist() == [60, 60]
        and np.bincount(test[1]).tolist() == [4, 4]
    )


@pytest.mark.parametrize('schedule', ['paper', 'one_cycle'])
def test_learning_rates(schedule, data):
    lrs = []

    class Watch(Callback):
        def after_batch(self):
            if self.training:
                lrs.append(self.opt.hypers[0]['lr'])

    dls = cifar100.get_dls(data, 'cifar100', 'report', 600, torch.device('cpu'))  # one batch an epoch
    o = SimpleNamespace(
        recipe='plain',
        seed=0,
        lr=0.1,
        wd=5e-4,
        nesterov=False,
        channels_last=False,
        amp=None,
        compile=False,
        schedule=schedule,
        epochs=8,
        run='',
        judge_every=99,
    )
    learn = cifar100.make_learner(o, dls, tiny_resnet)
    learn.model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    learn.add_cb(Watch())
    cifar100.fit(learn, o, cifar100.Checkpoint(Path('none.pth'), 99))
    assert learn.opt.hypers[0]['wd'] == 5e-4
    if schedule == 'paper':
        assert np.allclose(lrs, [0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001, 0.001])  # steps at 3/8, 5.2/8 and 7.2/8
    else:
        assert max(lrs) <= 0.1 and lrs[-1] < 0.01 and np.argmax(lrs) in (1, 2)


def test_published_tables_are_complete():
    one, two, four = (cifar100.published(t) for t in (1, 2, 4))
    assert (len(one), len(two), len(four)) == (40, 12, 6)
    for df in (one, two, four):
        assert set(df.recipe) <= set(cifar100.all_recipes) and not df.duplicated(['network', 'recipe']).any()
        assert all(hasattr(cifar100.eed_models, f'cifar_{o}') for o in df.network)
    assert (
        one.set_index(['network', 'recipe']).main['resnet18', 'eed_mse'] == 79.25
        and four.set_index('recipe').main['subset_0_2_main'] == 78.99
    )


def test_paired_differences():
    a, b = (
        pd.DataFrame(dict(seed=s, main=m))
        for s, m in (([0, 1, 2], [3.0, 5.0, 7.0]), ([2, 1, 0, 9], [5.0, 4.0, 2.0, 0.0]))
    )
    mean, half, n = cifar100.paired(a, b)  # 1, 1, 2
    assert n == 3 and abs(mean - 4 / 3) < 1e-9 and abs(half - 4.30265 * 0.57735 / 3**0.5) < 1e-4


@pytest.mark.parametrize(
    'kw,words',
    [
        (dict(), '--data'),
        (dict(data='x', recipe='eed_mes'), 'no recipe eed_mes'),
        (dict(data='x', network='vgg'), 'no network vgg'),
        (dict(table=3), 'no table 3'),
        (dict(data='x', schedule='cosine'), 'no schedule cosine'),
        (dict(data='nowhere'), 'holds no CIFAR-100'),
    ],
)
def test_mistakes(kw, words):
    with pytest.raises(cifar100.CliError, match=words):
        cifar100.main(**kw)


def test_a_mistake_is_one_line():
    out = run('--data', 'nowhere', ok=False)
    assert 'holds no CIFAR-100' in out and 'Traceback' not in out


@pytest.mark.skipif(
    not (cifar / 'train-val.txt').exists(), reason='needs CIFAR-100 as class sheets; set EED_CIFAR100 to its folder'
)
def test_class_sheets():
    train, test, vocab, is_val = cifar100.read_data(cifar)
    assert train[0].shape == (50000, 32, 32, 3) and test[0].shape == (10000, 32, 32, 3) and is_val.sum() == 5000
    assert np.allclose(train[0].mean((0, 1, 2)) / 255, cifar100_stats[0], atol=1e-4) and np.allclose(
        train[0].std((0, 1, 2)) / 255, cifar100_stats[1], atol=1e-4
    )
    assert (np.bincount(train[1]) == 500).all() and (np.bincount(train[1][is_val]) == 50).all()


def test_committed_rows_have_their_files():
    file = root / 'benchmarks' / 'results' / 'cifar100.csv'
    if not file.exists():
        pytest.skip('no rows yet')
    df = pd.read_csv(file)
    assert list(df.columns) == cifar100.columns and not df.run.duplicated().any()
    assert not df.commit.str.endswith('+').any() and not (df.commit == 'unknown').any()
    for row in df.itertuples():
        bits, curve = (
            np.load(root / 'benchmarks' / 'results' / 'bits' / f'{row.run}.npz'),
            pd.read_csv(root / 'benchmarks' / 'results' / 'history' / f'{row.run}.csv'),
        )
        assert (
            abs(np.unpackbits(bits['main'])[: row.n_judge].mean() * 100 - row.main) < 1e-3
            and len(curve) == row.epochs
            and abs(curve.accuracy.iloc[-1] * 100 - row.main) < 1e-3
        )


def test_imagenet_rows_on_a_tiny_tree(tmp_path):
    for part, n in (('train', 6), ('val', 3)):
        for c in ('n01', 'n02'):
            (tmp_path / part / c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(np.random.default_rng(i).integers(0, 256, (80, 70 + i, 3), dtype=np.uint8)).save(
                    tmp_path / part / c / f'{i}.JPEG'
                )
    imagenet.main(
        data=str(tmp_path),
        arch='resnet18',
        recipe='plain,eed_kl',
        epochs=1,
        bs=4,
        size=64,
        workers=0,
        results=str(tmp_path / 'out'),
    )
    df = pd.read_csv(tmp_path / 'out' / 'imagenet.csv')
    assert (
        df.recipe.tolist() == ['plain', 'eed_kl']
        and (df.n_train == 12).all()
        and (df.n_judge == 6).all()
        and df.network.tolist() == ['resnet18'] * 2
        and df.iloc[1][cifar100.exits].notna().all()
    )


def test_imagenet_arithmetic(capsys):
    imagenet.main(estimate=1000.0)
    out = capsys.readouterr().out
    assert 'resnet18' in out and '32.0 h' in out  # 1,281,167 images × 90 epochs at 1,000 a second
    with pytest.raises(imagenet.CliError, match='--data'):
        imagenet.main()


def test_reference_step_is_our_objective():
    z, f = (
        torch.randn(8, 4, 10).double(),
        torch.randn(8, 4, 6).double().relu(),
    )  # the mask changes nothing where features are not negative
    y = torch.randint(0, 10, (8,))
    assert torch.allclose(speed.reference_loss(z, f, y), speed.eed_feat_loss(z, f, y), atol=1e-10)


def test_speed_variants_and_growth():
    dls = speed.random_dls(2, 8, 16, 10, 'cpu')
    df = speed.measure(speed.variants(speed.tiny, 10, dls), 1, 2)
    assert len(df) == 11 and (df.seconds > 0).all()
    (row,) = speed.grow('exits', (2,), 1, width=8, bs=8)
    assert row['eed_mb'] > row['plain_mb'] > 0 and row['eed_params'] > row['plain_params']
