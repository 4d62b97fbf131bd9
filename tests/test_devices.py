"Two ranks give what one process gives with the doubled batch, and a compiled network what the network gives."

import subprocess, sys
import pytest
from conftest import *

here = Path(__file__).resolve().parent


def run(out, recipe, ranks, find_unused=False, **kw):
    "Train in so many processes; what each wrote"
    launch = [sys.executable]
    if ranks > 1:
        launch += ['-m', 'torch.distributed.run', '--nproc_per_node', str(ranks), '--master_port', '0']
        launch += ['--rdzv_backend', 'c10d', '--rdzv_endpoint', 'localhost:0']
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    env['PYTHONPATH'] = os.pathsep.join([str(here), str(here.parent)])
    command = [*launch, str(here / 'two_ranks.py'), str(out), recipe, str(find_unused)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, **kw)


def close(a, b):
    return torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    'recipe,find_unused',
    [('joint_ce', False), ('eed_mse', False), ('pl', False), ('mate_style', False), ('eed_mse', True), ('plain', True)],
)
def test_two_ranks_are_one_process_with_the_doubled_batch(recipe, find_unused, tmp_path):
    "Gradients, state (a temperature and a teacher's weights among it), columns and predictions"
    pytest.importorskip('accelerate', reason="accelerate is an extra: pip install 'eed_fastai[dev]'")
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        done = run(tmp_path / str(ranks), recipe, ranks, find_unused)
        assert done.returncode == 0, done.stderr[-3000:]
    one = torch.load(tmp_path / '1' / f'{recipe}0.pth')
    for rank in (0, 1):
        other = torch.load(tmp_path / '2' / f'{recipe}{rank}.pth')
        assert all(close(other['state'][k], v) for k, v in one['state'].items())
        for name, grad in one['grads'].items():
            assert grad is None or not grad.any() or close(other['grads'][name], grad), name
        assert close(other['preds'], one['preds']) and len(one['preds']) == 30
        shown = [k for k in one['columns'] if k not in ('train_loss', 'valid_loss')]
        assert shown and all(abs(other['columns'][k] - one['columns'][k]) < 1e-6 for k in shown)


@pytest.mark.slow
@pytest.mark.parametrize('recipe,find_unused', [('plain', False), ('mate_style', True)])
def test_what_a_method_needs_of_several_ranks_is_said(recipe, find_unused, tmp_path):
    pytest.importorskip('accelerate', reason="accelerate is an extra: pip install 'eed_fastai[dev]'")
    done = run(tmp_path, recipe, 2, find_unused)
    assert done.returncode != 0 and f'find_unused_parameters={not find_unused}' in done.stderr


# --- torch.compile --------------------------------------------------------------------------------------------------


def ten_losses(model):
    "Losses of ten steps in float64"
    dls = small_digits(bs=8)
    dls.train = dls.train.new(shuffle=False)
    losses = []

    class Keep(Callback):
        def after_batch(self):
            if self.training:
                losses.append(float(self.loss))
                if len(losses) == 10:
                    raise CancelFitException

        def before_batch(self):
            self.learn.xb = (self.xb[0].double(),)

    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), cbs=[EEDCallback(), Keep()], lr=0.01)
    learn.opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
    learn.remove_cb(Recorder)  # whose smooth loss is in float32
    with learn.no_logging():
        learn.fit(2)
    return losses


def network():
    set_seed(3)
    return multi_exit(tiny_resnet, n_out=10).double()


def compiled_in_place(model):
    model.compile(backend='aot_eager', fullgraph=True)
    return model


def wrapped(model):
    return torch.compile(model, backend='aot_eager', fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize('compiled', [compiled_in_place, wrapped])
def test_a_compiled_network_trains_as_the_network(compiled):
    "Without a single graph break (`fullgraph=True` refuses one)"
    torch._dynamo.reset()
    plain = ten_losses(network())
    found = ten_losses(compiled(network()))
    assert len(found) == 10 and np.allclose(found, plain, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize('compiled', [compiled_in_place, wrapped])
def test_exits_on_a_network_that_was_compiled(compiled):
    "The exits are put on what is inside, and can be compiled again"
    torch._dynamo.reset()
    set_seed(3)
    net = tiny_resnet(n_out=10).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = deepcopy(net).eval()(x)
    model = multi_exit(compiled(net))
    assert torch.allclose(model.eval()(x), expected, atol=1e-10)
    assert len(ten_losses(model.train())) == 10


@pytest.mark.slow
def test_exits_on_a_network_that_was_compiled_by_default():
    "The default backend rounds otherwise, so that the pieces would not be the network to the last bit"
    torch._dynamo.reset()
    net = tiny_resnet(n_out=10)
    x = torch.randn(2, 3, 32, 32)
    expected = deepcopy(net).eval()(x)
    net.compile()
    assert torch.equal(multi_exit(net).eval()(x), expected)
