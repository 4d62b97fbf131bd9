"Comparing recipes: the same start and batches for all, rows that are kept, numbers against loops."

import importlib, shutil, sys, pytest
from conftest import *
from eed_fastai import compare as compare_room
from eed_fastai.records import *
from eed_fastai.compare import *
from eed_fastai.figures import *


def digits():
    return small_digits(n=48, bs=8)


def run(**kw):
    return compare(
        digits(),
        tiny_resnet,
        **{**dict(names=['joint_ce', 'eed_mse'], seeds=2, epochs=1, file='rows.csv', dataset='some'), **kw},
    )


def test_the_same_start_and_the_same_batches():
    "For every recipe of a seed, and not for another seed"
    seen = {}

    class Watch(Callback):
        order = EEDCallback.order - 1

        def before_fit(self):
            self.key = len(seen)
            seen[self.key] = [torch.cat([p.flatten() for p in self.model.stages.parameters()]).sum().item()]

        def before_batch(self):
            if self.training:
                seen[self.key].append(self.x.sum().item())

    df = compare(
        digits(),
        tiny_resnet,
        ['plain', 'eed_mse', 'byot', 'beed', 'mate_style', 'hinton_kd'],
        seeds=2,
        epochs=2,
        fit=lambda learn: learn.fit(2, 1e-2, cbs=Watch()),
    )
    assert len(df) == 12 and len(seen) == 14  # hinton_kd trains its teacher, too
    assert (
        all(v == seen[0] for v in list(seen.values())[:7])
        and all(v == seen[7] for v in list(seen.values())[7:])
        and seen[0] != seen[7]
    )
    assert len(seen[0]) == 1 + 2 * 4


def test_rows_are_kept_and_not_run_again():
    first = run()
    assert first[['seed', 'recipe']].values.tolist() == [
        [0, 'joint_ce'],
        [0, 'eed_mse'],
        [1, 'joint_ce'],
        [1, 'eed_mse'],
    ]
    assert list(first.columns[:9]) == [
        'dataset',
        'network',
        'width',
        'recipe',
        'protocol',
        'epochs',
        'seed',
        'commit',
        'hardware',
    ] and {'torch', 'seconds', 'peak_memory', 'exit0', 'main', 'ensemble', 'nll_main', 'ece_ensemble'} <= set(first)
    assert first.run.is_unique and len(list(Path('history').iterdir())) == 4
    again = run()
    assert (
        again[['run', 'main', 'seconds']].equals(first[['run', 'main', 'seconds']])
        and len(pd.read_csv('rows.csv')) == 4
    )
    assert not set(run(lr=1e-2).run) & set(first.run)  # another setting is another run


def test_a_cut_comparison_goes_on():
    done = []

    def stop(row):
        done.append(row['run'])
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(show=stop)
    assert len(pd.read_csv('rows.csv')) == 3
    rest = []
    df = run(show=lambda row: rest.append(row['run']))
    assert len(df) == 4 and len(rest) == 1 and rest[0] not in done


def test_a_changed_recipe_is_another_run():
    mine = {'mine': Recipe('here', alpha=0.5)}
    a, b = run(names=mine, seeds=1), run(names={'mine': Recipe('here', alpha=0.6)}, seeds=1)
    assert a.run[0] != b.run[0] and len(pd.read_csv('rows.csv')) == 2


def test_a_network_is_copied():
    net = tiny_resnet(n_out=10)
    before = deepcopy(net.state_dict())
    df = compare(digits(), net, ['joint_ce'], seeds=1, epochs=1)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and df.network[0] == type(net).__name__


def test_a_folder_of_ones_own():
    for c, colour in (('cat', 60), ('dog', 180)):
        for i in range(12):
            (p := Path('pets') / c).mkdir(parents=True, exist_ok=True)
            Image.fromarray((np.random.rand(48, 40, 3) * 40 + colour).astype('uint8')).save(p / f'{i}.png')
    dls = ImageDataLoaders.from_folder('pets', valid_pct=0.25, seed=0, item_tfms=Resize(32), bs=6, num_workers=0)
    df = compare(dls, resnet18, ['plain', 'eed_mse'], seeds=1, epochs=1, dataset='pets')
    table = comparison_table(df, base='plain')
    assert table.recipe.tolist() == ['plain', 'eed_mse'] and table.exit0[0] == '' and '(1)' in table['main − plain'][1]


def test_plain_has_no_exits_to_report():
    df = run(names=['plain'], seeds=1)
    assert 'exit0' not in df and 'ensemble' not in df and df.main.notna().all()


def test_agreement_and_similarity_against_loops():
    torch.manual_seed(0)
    z, y = torch.randn(40, 3, 4), torch.randint(4, (40,))
    df = agreement(z, y)
    for i in range(2):
        n = Counter((int(z[b, i].argmax()) == int(y[b]), int(z[b, 2].argmax()) == int(y[b])) for b in range(40))
        r = df.iloc[i]
        assert np.allclose(
            [r.both, r.exit_only, r.main_only, r.neither],
            [n[a] / 40 for a in ((True, True), (True, False), (False, True), (False, False))],
            atol=1e-6,
        )
        assert np.isclose(r.disagree, r.exit_only + r.main_only) and np.isclose(r.either, 1 - r.neither, atol=1e-6)
    x = torch.randn(12, 5)
    y = torch.arange(3).repeat_interleave(4)

    def pearson(a, b):
        a, b = a - a.mean(), b - b.mean()
        return float((a * b).sum() / (a.norm() * b.norm()))

    within = [pearson(x[i], x[j]) for i in range(12) for j in range(12) if i != j and y[i] == y[j]]
    between = [abs(pearson(x[i], x[j])) for i in range(12) for j in range(12) if y[i] != y[j]]
    sim = class_similarity(x, y)
    assert np.allclose([sim['within'], sim['between']], [np.mean(within), np.mean(between)], atol=1e-5)


def test_main_activations_are_the_main_networks():
    learn = make_learner(EEDCallback(), model=multi_exit(tiny_resnet, n_out=10))
    f, z, y = main_activations(learn, n=20)
    assert f.shape == (20, 64) and (y.diff() >= 0).all()
    assert torch.allclose(learn.model.heads[-1].fc(f), z, atol=1e-5)


def test_ensembles_that_answer():
    learn = make_learner(EEDCallback(), model=multi_exit(tiny_resnet, n_out=10))
    p, y = learn.get_exit_preds()
    mean, _ = learn.get_preds(cbs=EnsemblePreds(mean_probs))
    assert torch.allclose(mean, p.mean(1), atol=1e-5)
    assert np.isclose(
        learn.validate(cbs=EnsemblePreds())[1], learn.validate_exits().set_index('exit').accuracy['ensemble'], atol=1e-6
    )
    learn.add_cb(EnsemblePreds(mean_probs))
    with learn.no_logging():
        learn.fit(1, 1e-3)  # training does not notice
    assert set(learn.recorder.metric_names) >= {'main', 'ensemble'}
    assert torch.isfinite(torch.tensor(learn.recorder.losses)).all()


def test_train_curve_is_judged_like_test_images():
    learn = make_learner(EEDCallback(), model=multi_exit(tiny_resnet, n_out=10))
    cb = TrainCurve()
    with learn.no_logging():
        learn.fit(2, 1e-2, cbs=cb)
    p, y = learn.get_exit_preds(dl=learn.dls.valid.new(dataset=learn.dls.train_ds))
    assert np.allclose(
        cb.curve.iloc[-1][learn.model.exit_names].tolist(), (p.argmax(-1) == y[:, None]).float().mean(0), atol=1e-6
    )
    assert cb.curve.epoch.tolist() == [0, 1]


def test_ten_classes_of_many():
    learn = make_learner(EEDCallback(), model=multi_exit(tiny_resnet, n_out=10))
    _, _, y = main_activations(learn, classes=4)
    assert 1 <= len(y.unique()) <= 4


def test_callbacks_and_metrics_of_ones_own():
    class Count(Callback):
        n = 0

        def before_batch(self):
            Count.n += self.training

    df = run(names=['eed_mse'], cbs=Count(), metrics=error_rate, seeds=1)
    assert Count.n == 4 and 'error_rate' in pd.read_csv(f'history/{df.run[0]}.csv')


def test_a_changed_recipe_keeps_what_it_is():
    r = recipes['beed'] | {'alpha': 1.0}
    assert (r['alpha'], r.head, r.source) == (1.0, BEEDHead, recipes['beed'].source)
    with pytest.raises(TypeError, match='dict of name → Recipe'):
        run(names={'mine': dict(alpha=1.0)})


def test_a_function_with_another_body_is_another_run():
    def recipe(i):
        if i == 0:

            def teacher(z):
                return z.mean(1, keepdim=True)
        else:

            def teacher(z):
                return z.amax(1, keepdim=True)

        return {'mine': Recipe('here', teacher=teacher)}

    a, b, c = (run(names=recipe(i), seeds=1).run[0] for i in (0, 1, 0))
    assert a != b and a == c


def test_without_torchmetrics_the_calibration_column_stays_empty(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchmetrics', None)
    scores = exit_scores(dict(main=torch.eye(3)), torch.arange(3))
    assert scores['ece_main'] is None and scores['main'] == 100.0 and scores['nll_main'] > 0


def tutorial_digits(n=10, bs=25, n_valid=500):
    "The tutorial's data: `n` training images of each class"
    items = all_digits.train_ds.items
    x = np.stack([np.array(im) for im, _ in items])
    y = np.array([int(c) for _, c in items])
    few = np.concatenate([np.flatnonzero(y == c)[:n] for c in range(10)])
    rest = np.setdiff1d(np.arange(len(y)), few)[:n_valid]
    return array_dls((x[few], y[few]), (x[rest], y[rest]), list('0123456789'), bs=bs, pad=2, flip=0.0)


def test_the_committed_rows_are_found_without_training(monkeypatch):
    "The tutorial's two comparisons read each row of the repository, though functions have moved or been renamed"
    committed = Path(__file__).resolve().parent.parent / 'benchmarks/results/digits/rows.csv'
    shutil.copy(committed, 'rows.csv')
    rows = pd.read_csv(committed)
    methods = ['plain', 'joint_ce', 'branchynet', 'main_mse', 'eed_mse', 'eed_kl', 'pl', 'byot', 'beed', 'mate_style']
    table = {name: recipes[name] for name in [*methods, 'hinton_kd']} | subset_recipes()
    assert set(table) == set(rows.recipe)
    missing = []

    def no_training(dls, arch, recipe, seed, fit, options):
        missing.append(compare_room._identity(dict(recipe)))
        return {'main': 0.0}, 0.0, pd.DataFrame(dict(epoch=[0]))

    monkeypatch.setattr(compare_room, '_run', no_training)
    found = compare(tutorial_digits(), tiny_resnet, table, 5, 30, 1e-2, 'rows.csv', 'digits-10x10')
    assert not missing, f'add to `_names_in_rows` what these recipes call otherwise than their rows: {missing}'
    assert sorted(found.run) == sorted(rows.run) and len(found) == 75


def test_names_in_rows_are_of_functions_that_exist():
    "What moves or is renamed again must be entered anew"
    for name in compare_room._names_in_rows:
        room, function = name.rsplit('.', 1)
        assert hasattr(importlib.import_module(room), function), name


def test_a_function_written_in_c_is_an_option():
    "Such as a dict's `get` for weights that depend on the number of exits"

    def mine(last):
        return {'mine': Recipe('here', label_weights={4: [1, 1, 1, last]}.get)}

    a, b, again = (run(names=mine(last), seeds=1).run[0] for last in (1, 2, 1))
    assert a != b and a == again
