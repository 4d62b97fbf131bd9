"What only a GPU can show."

import pytest
from conftest import *

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def test_the_callback_never_waits_for_the_gpu(monkeypatch):
    learn = make_learner(EEDCallback(beta=1.0), dls=small_digits(device='cuda'))
    batches, original = [], EEDCallback.__call__

    def watched(self, event):
        if event == 'before_batch':
            batches.append(event)
        if len(batches) < 2 or event not in ('before_batch', 'after_pred', 'after_loss'):
            return original(self, event)  # targets are looked at in the first batch
        torch.cuda.set_sync_debug_mode('error')
        try:
            return original(self, event)
        finally:
            torch.cuda.set_sync_debug_mode('default')

    monkeypatch.setattr(EEDCallback, '__call__', watched)
    with learn.no_logging():
        learn.fit(2)
    assert len(batches) > 8


def test_scaler_and_half_precision():
    learn = make_learner(EEDCallback(beta=1.0), dls=small_digits(device='cuda')).to_fp16()
    with learn.no_logging():
        learn.fit(2, 1e-3)
    assert np.isfinite(learn.final_record).all() and learn.get_exit_preds()[0].dtype == torch.float32


def test_memory_loader_stays_on_the_gpu():
    x, y = np.zeros((32, 8, 8, 3), np.uint8), np.zeros(32, int)
    dls = array_dls((x, y), (x, y), vocab=['a', 'b'], bs=8, device='cuda')
    xb, yb = dls.one_batch()
    assert xb.is_cuda and yb.is_cuda and dls.train_ds.tensors[0].is_cuda


def test_early_exit_on_the_gpu():
    for dtype, fmt in ((torch.float64, torch.contiguous_format), (torch.float16, torch.channels_last)):
        model = multi_exit(tiny_resnet, 5).eval().to('cuda', dtype, memory_format=fmt)
        x = torch.randn(65, 3, 16, 16, device='cuda', dtype=dtype).contiguous(memory_format=fmt)
        with torch.no_grad():
            z = model.all_exits(x).logits
        ts = [max_prob(z[:, : i + 1].double()).median().item() for i in range(3)]
        for thresholds in (ts, [2.0, *ts[1:]], [0.0] * 3, [2.0] * 3):
            out, idx = early_exit(model, x, thresholds, score=lambda z: max_prob(z.double()))
            where = exits_taken(z.double(), thresholds)
            assert (
                out.is_cuda
                and idx.is_cuda
                and (idx == where).float().mean() > (0.9 if dtype == torch.float16 else 0.999)
            )
            same = idx == where
            assert torch.allclose(out[same], z[range(65), where][same], atol=2e-2 if dtype == torch.float16 else 1e-9)
    assert (part_times(model, x[:2], rounds=2) > 0).values.all()
