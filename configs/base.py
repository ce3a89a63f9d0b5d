"""Every knob of an experiment, explained once; the other files here change values.

A value is overridden on the command line by its path: `--config.optimizer.learning_rate=1e-3`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The paper's method with a ResNet-50; each data set's file says what differs."""
    config = ConfigDict()
    config.seed = 0  # weights, batches and augmentation follow from it

    config.profile_steps = ""  # "10:15": writes a profiler trace of the steps 10 to 14

    config.data = data = ConfigDict()
    data.name = "glyphs"  # which data set: see cgd_jax/data
    data.source = ""  # the archive you have, or the folder it unpacks to
    # What is tested on, if that is another data set; the same for its source.
    data.test_name = ""
    data.test_source = ""
    data.radius = 25.0  # of places: within so many metres (or frames) of a query an image is right
    data.turn = 180.0  # of places: if it also looks in the same direction, up to so many degrees
    data.dir = ""  # where data sets and caches are built; "": where TFDS puts them
    data.resize = 252  # pixels: training images are resized to this square, ratio not kept
    data.image_size = 224  # pixels the network sees, a square
    # Pixels of the crops that training cuts out; 0: image_size. Smaller ones make objects look as
    # large in training as in tests: https://arxiv.org/abs/1906.06423.
    data.crop_size = 0
    # "keep": embeds test images in about a dozen shapes of image_size² pixels, of which each takes
    # the nearest; training crops squares all the same.
    data.aspect = "square"
    data.bbox_crop = True  # cuts out the bounding box first, where there is one (CUB, CARS)
    # Of resized images; "20GB": as many of each split as fit into that, the others are decoded as
    # needed, as all are with "none".
    data.cache = "disk"
    data.allow_incomplete = False  # goes on though counts differ from the published ones
    data.max_bad_fraction = 0.01  # share of unreadable files that stops a build
    data.split_seed = 0  # image_folder: which classes train and which test
    data.test_fraction = 0.5  # image_folder: share of the classes that test
    # Training classes that are held back to choose checkpoints by, drawn by split_seed: a share of
    # them, or the i-th of n parts, as in "1/4". Without any, the last step is reported.
    data.validation_fraction = 0.0
    data.fold = ""
    data.nested_classes = False  # image_folder: every folder with images is a class

    # What training does to an image beyond a random crop; all but the flip is off in the paper.
    config.augment = augment = ConfigDict()
    augment.flip = True  # mirrors half of the images, left to right
    augment.pad = 0  # pixels of edge added on every side before the random crop
    augment.min_area = 1.0  # below 1: resized crops of at least this share of the area
    augment.jitter = 0.0  # brightness, contrast, saturation: by up to this factor
    augment.erase = 0.0  # probability that a rectangle is blanked out

    config.model = model = ConfigDict()
    model.backbone = "resnet50"  # "auto": the one that model.pretrained has the weights of
    model.pretrained = ""  # weights to start from: a file, a run, a Hugging Face repository
    model.width = 64  # channels of a ResNet's stem; 64 is the published network
    model.stem = "7x7"  # "3x3" for images of 64 pixels and less; of a ResNet
    model.stem_stride = 2  # of a ResNet's first convolution; 1 keeps the full resolution
    model.last_stride = 1  # 1 as in the paper: 14 × 14 positions from 224 pixels; 2 as in ResNet
    model.stride_removed = "layer4"  # of a ResNet, by last_stride; "layer3": as in leftthomas/CGD
    model.patch_size = 0  # pixels: side of a ConvNeXt's or ViT's first patches; 0: as published
    # Letters S, M, G, R, and C, the class token of a vision transformer; the first one feeds the
    # auxiliary module.
    model.descriptors = "SG"
    model.gem_p = 3.0  # GeM's exponent, or where it starts if it is learned
    model.learn_p = "fixed"  # "scalar": one exponent is learned; "channel": one a channel
    model.embedding_dim = 1536  # of all branches together
    model.combination = "concat"  # "sum", "separate" (rival A), "raw" (rival B)
    # "mean": takes it from the descriptors, so that none collapse; "direction": likewise, of
    # descriptors of unit length, which keeps networks trained from scratch apart as well.
    model.center = "none"
    model.fc_init = "orthogonal"  # of the descriptors' FC layers; or "lecun_normal"
    model.freeze_batch_norm = False  # keeps the backbone's statistics; the paper updates them
    model.frozen_blocks = 0  # so many of the backbone's lowest blocks, and its stem, never learn
    model.drop_path = 0.0  # chance that training leaves the last block out, of a ConvNeXt or ViT
    model.remat = False  # keeps no activations within a block: less memory, more time
    # Of the computation; parameters, statistics and losses are float32. "auto": bfloat16 on
    # TPUs and on NVIDIA's GPUs since Ampere, else float32.
    model.dtype = "auto"

    config.loss = loss = ConfigDict()
    loss.ranking = "batch_hard_triplet"  # one of those below, see docs/losses.md
    loss.ranking_weight = 1.0  # 0 switches the ranking loss off
    loss.miner = "batch_all"  # which pairs losses on pairs and triplets see
    loss.memory = 0  # so many embeddings of earlier batches they see besides
    loss.memory_from = 1000  # the step at which the memory begins to fill
    loss.distance_weighted = ConfigDict({"cutoff": 0.5, "nonzero_cutoff": 1.4})
    loss.classification = "softmax"  # of the first descriptor; the others are of the embedding
    loss.classification_weight = 1.0  # 0 switches the auxiliary loss off (the paper's "Rank")
    loss.temperature = 0.5  # of "softmax", τ: the logits are divided by it
    loss.smoothing = 0.1  # of "softmax", ε of the label smoothing
    loss.sub_centers = 1  # of the others: centers a class, of which the nearest counts
    # Options of every loss. Margins are in units of distance, or of cosine where vectors are
    # compared by it; arcface's is in radians.
    loss.batch_hard_triplet = ConfigDict({"margin": 0.1})
    loss.batch_all_triplet = ConfigDict({"margin": 0.1})
    loss.semi_hard_triplet = ConfigDict({"margin": 0.1})
    loss.soft_margin_triplet = ConfigDict({"scale": 1.0})
    loss.contrastive = ConfigDict({"margin": 1.0})
    loss.multi_similarity = ConfigDict(
        {"alpha": 2.0, "beta": 50.0, "base": 0.5, "mining_margin": 0.1}
    )
    loss.info_nce = ConfigDict({"temperature": 0.07})
    loss.sup_con = ConfigDict({"temperature": 0.1})
    loss.circle = ConfigDict({"margin": 0.25, "scale": 256.0})
    loss.lifted_structure = ConfigDict({"margin": 1.0})
    loss.n_pair = ConfigDict({"scale": 16.0})
    loss.smooth_ap = ConfigDict({"temperature": 0.01})
    loss.recall_at_k = ConfigDict(
        {"ks": (1, 2, 4, 8, 16), "rank_temperature": 0.01, "k_temperature": 1.0, "mixup": 0}
    )
    loss.proxy_nca = ConfigDict({"temperature": 1 / 9})
    loss.proxy_anchor = ConfigDict({"margin": 0.1, "alpha": 32.0})
    loss.soft_triple = ConfigDict(
        {"centers": 10, "scale": 20.0, "gamma": 0.1, "margin": 0.01, "regularization": 0.2}
    )
    loss.normalized_softmax = ConfigDict({"temperature": 0.05})
    loss.cosface = ConfigDict({"margin": 0.35, "scale": 64.0})
    loss.arcface = ConfigDict({"margin": 0.5, "scale": 64.0})

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adam"  # "adamw", "sgd"
    optimizer.learning_rate = 1e-4  # the highest of the schedule
    optimizer.proxy_learning_rate = 1e-2  # likewise, of proxies and of class centers
    optimizer.backbone_lr_scale = 1.0  # the backbone's learning rate, as a factor of the first
    optimizer.fc_lr_scale = 1.0  # the same of the descriptors' FC layers
    optimizer.layer_decay = 1.0  # below 1: every block's rate is so much that of the one above it
    optimizer.freeze_backbone_steps = 0  # for so many steps only the new layers learn
    optimizer.weight_decay = 0.0  # decoupled, for adamw and sgd; of kernels only
    optimizer.momentum = 0.9  # of sgd
    optimizer.schedule = "step"  # "cosine" (to 0 at the last step), "constant"
    optimizer.decay_at = (0.5, 0.75)  # of "step": when, as shares of all steps
    optimizer.decay_factor = 0.1  # of "step": by what
    optimizer.warmup_steps = 0  # linear from 0, for every schedule
    optimizer.ema_decay = 0.0  # above 0: evaluates a moving average of the weights, of this decay

    config.train = train = ConfigDict()
    train.steps = 1500  # 0: every image about 15 times, 1,200 steps at most
    train.classes_per_batch = 32  # P; 0: as many as there are, 12 at most
    train.images_per_class = 4  # K; the batch has P × K images
    train.gradient_cache_chunk = 0  # above 0: activations of so many images at a time are held
    train.shard = "none"  # "parameters": every device holds a part of them, see docs/devices.md
    train.skip_nonfinite = 0  # steps in a row with a loss that is not finite to pass over
    train.log_every = 20  # steps between lines in history.csv
    train.eval_every = 500  # steps between evaluations
    train.checkpoint_every = 100  # steps between checkpoints
    train.keep = 2  # latest checkpoints kept, beside the chosen one
    # Without validation classes: reports the step that is best on the test classes, as most papers
    # do, in place of the last one.
    train.best_of_test = False
    train.patience = 0  # evaluations without a better one that end a run; 0: all steps are done
    train.tracker = ""  # "wandb", "mlflow": shows the history there too, beside TensorBoard

    config.eval = evaluation = ConfigDict()
    evaluation.batch_size = 256  # images
    evaluation.ks = (1, 2, 4, 8)  # the K of Recall@K
    evaluation.baselines = True  # also measures raw pixels and the untrained network
    evaluation.center_crop = False  # of images resized as for training; else straight to size
    evaluation.matmul_precision = "highest"  # of the products; "default" is the device's fastest
    evaluation.bootstrap = 1000  # resamplings of the classes for 95 % intervals
    evaluation.clustering = False  # also NMI and AMI by k-means (needs scikit-learn; slow)
    evaluation.save_embeddings = False  # writes embeddings.npz: vectors, ids, labels
    evaluation.projection = ""  # draws embeddings.png, a map: "pca", "umap" (needs umap-learn)
    evaluation.projector = False  # writes what TensorBoard's projector shows, up to 10,000 images
    evaluation.complementarity = False  # compares the branches with one another and with all
    # What may be done to a trained model; measured beside the plain embedding, at the end
    # and by --mode=eval. In this order:
    evaluation.vector = "embedding"  # or descriptors, first_descriptor, descriptor_S, branch_S
    evaluation.flip = False  # adds the vector of the mirrored image
    evaluation.scales = (1.0,)  # adds up vectors at several scales of image_size
    evaluation.scales_p = 1.0  # of these and the mirrored: exponent of a generalized mean; 1: added
    evaluation.whitening_dim = 0  # whitening learned on the training images; 0: none
    evaluation.whitening = "pca"  # or "pairs": what differs within a class becomes white
    evaluation.database_augmentation = 0  # nearest neighbours added to every gallery item
    evaluation.query_expansion = 0  # nearest gallery items added to every query
    # Of both: a neighbour's weight is its similarity to this power.
    evaluation.query_expansion_alpha = 3.0
    evaluation.rerank = False  # k-reciprocal re-ranking
    return config
