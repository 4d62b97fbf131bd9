"Images in memory in a Learner: everything that works with files works with arrays."

import os, pickle, pytest
from conftest import *


def arrays(n=64):
    xs, ys = zip(*all_digits.train_ds.items[:n])
    return np.stack(xs), np.array([int(y) for y in ys])


def memory_dls(**kw):
    x, y = arrays()
    return array_dls(
        (x[:40], y[:40]), (x[40:], y[40:]), vocab=list(all_digits.vocab), **{'bs': 16, 'device': 'cpu', **kw}
    )


def test_learner_on_arrays(tmp_path):
    learn = make_learner(EEDCallback(), dls=memory_dls())
    with learn.no_logging():
        learn.fit(1, 1e-2)
    p, y = learn.get_preds()
    assert p.shape == (24, 10) and y.tolist() == arrays()[1][40:].tolist()
    item = arrays()[0][40]
    assert torch.allclose(learn.predict(item)[2], p[0], atol=1e-5)
    assert learn.tta(n=2)[0].shape == (24, 10)
    assert learn.get_exit_preds(0)[1].tolist() == arrays()[1][:40].tolist()
    learn.show_results(max_n=4)
    ClassificationInterpretation.from_learner(learn).plot_top_losses(2)
    learn.export('export.pkl')
    assert Path('export.pkl').stat().st_size < 4 * total_params(learn.model)[0] * 1.2 + 4e5  # no images in it
    assert torch.allclose(load_learner('export.pkl').predict(item)[2], p[0], atol=1e-5)


@pytest.mark.parametrize('drop_last,sizes', [(False, [16, 16, 8]), (True, [16, 16])])
def test_last_batch(drop_last, sizes):
    dls = memory_dls(drop_last=drop_last)
    assert [len(x) for x, _ in dls.train] == sizes and len(dls.train) == len(sizes)


def test_every_image_once_in_a_new_order():
    dls = memory_dls(pad=None)
    first, second = ([y.tolist() for _, y in dls.train] for _ in range(2))
    assert first != second and sorted(sum(first, [])) == sorted(sum(second, [])) == sorted(arrays()[1][:40].tolist())


def test_bytes_are_normalised_as_the_stats_say():
    x, _ = arrays()
    xb = memory_dls(stats=((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))).valid.one_batch()[0]
    want = (
        torch.tensor(x[40:]).permute(0, 3, 1, 2).double() / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    ) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    assert torch.allclose(xb.double().as_subclass(Tensor), want[: len(xb)], atol=1e-5)


def test_crops_come_before_the_normalisation():
    dls = array_dls(
        (np.full((8, 4, 4, 3), 255, np.uint8), np.zeros(8, int)),
        (np.full((8, 4, 4, 3), 255, np.uint8), np.zeros(8, int)),
        vocab=['a', 'b'],
        stats=((0.5,) * 3, (0.5,) * 3),
        bs=8,
        pad=3,
        device='cpu',
    )
    assert set(dls.one_batch()[0].unique().tolist()) == {-1.0, 1.0}  # black around the image, not the mean


def test_one_image_needs_one_label():
    x, y = arrays()
    with pytest.raises(ValueError, match='they are 0 to 2'):
        array_dls((x, y), (x, y), vocab=['a', 'b', 'c'])
    with pytest.raises(ValueError, match='expected whole numbers'):
        array_dls((x, y / 1.0), (x, y), vocab=list(all_digits.vocab))


def test_a_pickle_that_runs_code_is_not_opened(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.system, ('touch hacked',)

    for name in ('train', 'test', 'meta'):
        (tmp_path / name).write_bytes(pickle.dumps(Bad()))
    with pytest.raises(ValueError, match='it is not opened'):
        cifar100_dls(tmp_path)
    assert not Path('hacked').exists()
