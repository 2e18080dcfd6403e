"""Config of a run that compiles quickly: denoising with SM3, one level, on the procedural world."""

from sfv_jax import config as defaults

UNET = dict(
    in_channels=96,
    out_channels=48,
    block_out_channels=(16,),
    num_attention_heads=(2,),
    layers_per_block=1,
    cross_attention_dim=12,
    addition_time_embed_dim=8,
    num_frames=2,
    norm_groups=4,
)


def get_config():
    config = defaults.tiny(defaults.teacher())
    config.generator_optimizer = defaults.sm3(1e-3)
    config.teacher.sample_steps = 1
    config.update(
        dict(
            steps=4,
            batch_size=8,
            log_every=1,
            checkpoint_every=1,
            keep_checkpoints=4,
            sample_every=2,
            sample_count=1,
            patch_codec=dict(patch=4, embed_cell=8),
            data=dict(world=dict(size=16, num_frames=2), world_size=64),
            unet=UNET,
        )
    )
    return config.lock()
