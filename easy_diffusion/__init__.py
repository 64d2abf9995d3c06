"""Easy Diffusion: diffusion models in PyTorch, written to be read and copied.

The folders, in reading order:

    diffusion/       noise schedules, prediction types, losses, samplers, guidance, flow matching
    networks/        UNet, autoencoder, text encoders; reading and writing their weights
    training/        the training loop and what surrounds it: data loader, optimizers, checkpoints
    evaluation/      classifiers, also by a diffusion model; Fréchet distance, PSNR, SSIM
    inpainting/      RePaint in pixels and in latents, Stable Diffusion's inpainting model
    editing/         SDEdit, regional captions, inversion, editing by attention
    animation/       camera moves over an image, written as GIF, WebP or MP4

and the files beside them:

    files.py            atomic writing of files
    images.py           PNG files and contact sheets with Chinese captions
    diagrams.py         diagrams of the methods, for the notebooks
    notebook.py         what the first cell of each notebook calls
    latent_space.py     encoding and decoding batches with an autoencoder
    presets.py          the demo's data sets, networks and hyperparameters
    pretrained.py       trained models as files that contain all that rebuilds them
    generate.py         from trained networks to images of named dishes
    dish_classifier.py  the attribute classifier of drawn dishes, trained and saved
    command_line.py     what all commands share: ranges of numbers, errors in one line
    demo.py             the command python -m easy_diffusion.demo
    demo_options.py     its options
    train_demo.py       the command python -m easy_diffusion.train_demo
    photo_presets.py    the presets for photographs
    train_photos.py     the command python -m easy_diffusion.train_photos
    train_control.py    the command python -m easy_diffusion.train_control
    film_presets.py     the presets for films, and their sampling
    train_motion.py     the command python -m easy_diffusion.train_motion
    masked_dishes.py    drawn dishes with the masks of the camera moves
    edit.py             the command python -m easy_diffusion.edit
    classify.py         the command python -m easy_diffusion.classify
    app.py              the local web page: python -m easy_diffusion.app
    app_requests.py     what its buttons do
    train_model.py      the command python -m easy_diffusion.train_model
    train_options.py    its options
    train_setup.py      from its options to a dataset, a text encoder, a network and a diffusion
"""
