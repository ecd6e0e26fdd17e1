"""The numbered ways in which DP fine-tuning breaks silently; `pitfalls` makes a page of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["breaks the guarantee", "weakens it", "wrong figure"]
BREAKS: Severity = "breaks the guarantee"
WEAKENS: Severity = "weakens it"
FIGURE: Severity = "wrong figure"


@dataclass(frozen=True)
class Trap:
    """wrong: what goes wrong; shows: how that shows, or why it does not; here: how this code rules
    it out; reference: who described it; no_mutant: why no mutant has its number, if none has."""

    number: int
    title: str
    severity: Severity
    wrong: str
    shows: str
    here: str
    reference: str = ""
    no_mutant: str = ""


TRAPS = (
    Trap(
        1, "A loss that averages over the batch's tokens", BREAKS,
        "A language model's built-in loss divides by the number of target tokens in the batch, so "
        "that each record's gradient depends on how long the others are, before any clipping.",
        "Training looks normal. Change one record: the gradients of the others move.",
        "An objective returns one loss per record, a function of that record alone. Both engines "
        "are compared with a loop over one record at a time.",
    ),
    Trap(
        2, "The true number of units in the rate or the divisor", BREAKS,
        "With q = batch / N or a mean over the batch that was drawn, the scale of signal and noise "
        "is a function of N, which is itself not noised.",
        "It does not show in the loss. With one unit more or less the noise has another variance, "
        "which many coordinates measure well.",
        "The rate and the divisor follow from the plan and from the size that a person declared.",
    ),
    Trap(
        3, "A partial sum that survives an aborted step", WEAKENS,
        "A batch processed in pieces keeps its sum on the optimiser; when a piece raises, the next "
        "step starts from what was left, and a unit may be in the released sum twice.",
        "Nothing is logged: the retry succeeds.",
        "The sum is a local variable of the step, and a step that raises releases nothing.",
    ),
    Trap(
        4, "A non-finite gradient passes the clip", BREAKS,
        "The factor min(1, C/norm) is 1 or NaN where the norm is NaN, according to the order of "
        "arguments. One record then sets every parameter to NaN.",
        "Its presence can be read off the update, which is not finite.",
        "A unit whose norm is not finite is multiplied by 0 and contributes nothing.",
    ),
    Trap(
        5, "Noise from a seeded generator", BREAKS,
        "After a global seed, or in workers forked with the same generator state, the noise can be "
        "drawn again by whoever knows the seed and subtracted from the update.",
        "The noise passes any statistical test. Two runs with one seed agree.",
        "Noise is an AES-256-CTR keystream under a key that each call takes from the operating "
        "system; no seed that anybody sets reaches the draw.",
    ),
    Trap(
        6, "A secure generator that is off by default", BREAKS,
        "Where cryptographic noise is an option with a dependency that is hard to install, the "
        "option stays off and the noise comes from a predictable generator.",
        "No warning is raised later, and reports do not say which generator was used.",
        "There is one generator, always the cryptographic one, and no option for another.",
    ),
    Trap(
        7, "Un-noised gradients left on the model", BREAKS,
        "Per-record gradients and their sums stay as attributes of the parameters after the step; "
        "a checkpoint, a callback or a debugger then stores them.",
        "The update itself is correct. Look at the parameters' attributes after a step.",
        "Engines take their hooks off when they are done, and buffers are overwritten with zeros "
        "once they were added up.",
    ),
    Trap(
        8, "Empty batches are dropped", WEAKENS,
        "Poisson sampling sometimes draws nobody. A loop that skips such a step adds no noise and "
        "tells that the draw was empty; a division of rows among processes loses some in the same "
        "way.",
        "At usual batch sizes it almost never happens in a test run.",
        "An empty draw is a step of noise alone, with its line in the step log; the sum over "
        "several processes is that of one process, bit for bit.",
    ),
    Trap(
        9, "Shuffled or fixed-size batches accounted as Poisson", WEAKENS,
        "The accountant assumes that every unit joins every step independently. Shuffled epochs "
        "and fixed batch sizes have no such draw and less amplification.",
        "ε is smaller than it should be; the data loader gives no error.",
        "The sampler draws each unit by itself at rate q. Tests of batch size variance and of "
        "pairwise inclusion refuse other samplers.",
        "Chua et al. 2024, How private are DP-SGD implementations?",
    ),
    Trap(
        10, "An accountant that approximates downwards", FIGURE,
        "A central-limit (GDP) accountant states less ε than the mechanism spends, and so does one "
        "that reads a single noise level where a study had several.",
        "It is seen only beside another accountant.",
        "ε is computed by privacy loss distributions, rounded towards caution, and is refused "
        "where it lies above an independent RDP bound.",
        "Gopi, Lee & Wutschitz 2021, Numerical composition of differential privacy",
    ),
    Trap(
        11, "A layer without per-record gradients", BREAKS,
        "Recomputed activations, a layer used twice, or a layer that the hooks do not know leave a "
        "parameter with the gradient of the batch, or with part of it.",
        "The optimiser takes whatever is there; shapes agree.",
        "A trainable parameter without a gradient for each row is an error before anything is "
        "released; layers that are used twice are added up before the norm.",
    ),
    Trap(
        12, "Adapter options that read the data or escape the hooks", BREAKS,
        "Adapters on embeddings and some LoRA variants have no per-record gradient, and some "
        "initialisations (EVA, CorDA, LoRA-GA) are computed from private records.",
        "The library accepts the option, and the start of the adapter is not counted in ε.",
        "A plan has a closed list of options and a site an allow-list of modules. The frozen "
        "factor comes from the public seed or from public text.",
    ),
    Trap(
        13, "A first dimension that is not the batch", BREAKS,
        "A position embedding or a scaling is broadcast over the batch, so its gradient has first "
        "dimension 1 and is clipped as if it were one record's.",
        "Broadcasting makes the shapes fit.",
        "The first dimension of every gradient must be the number of rows, or of their passages "
        "and tiles.",
    ),
    Trap(
        14, "An adapter that never learns while ε is spent", FIGURE,
        "Wrapped modules, wrong parameter names or an optimiser that does not step leave the model "
        "as it was. ε is correct and pays for nothing.",
        "Noise moves every weight, so that a changed adapter proves nothing.",
        "Before the first round one step without noise on generated records must lower their loss; "
        "a saved adapter is loaded by plain PEFT in a fresh process and must give the same logits.",
        "Opacus, issue 820",
    ),
    Trap(
        15, "Norms in reduced precision", WEAKENS,
        "In bf16, or over one layer in place of all, the computed norm is smaller than the true "
        "one, and a row above C passes.",
        "The excess is small: a test with a tolerance, or on random data, does not notice it.",
        "Norms are computed in fp64 over all parameters, with room for their own rounding, and "
        "rows are rounded to an integer grid before they are added.",
    ),
    Trap(
        16, "A step over missing gradients", BREAKS,
        "Where no gradient arrived, a private optimiser may update without clipping, noise or a "
        "line in the accountant; a row that is missing or doubled is not noticed.",
        "The call returns without an error.",
        "A missing gradient is an error, and each drawn row must come back exactly once.",
    ),
    Trap(
        17, "Noise added per chunk, per process, or divided twice", WEAKENS,
        "Gradient accumulation and several processes multiply the places where noise can be added; "
        "noise meant for the sum is divided by the batch.",
        "Too much noise looks like a hard task, too little like an easy one.",
        "One place adds noise, once, to the sum. The variance is tested for several numbers of "
        "chunks and of processes.",
    ),
    Trap(
        18, "Operations across the records of a batch", BREAKS,
        "Batch normalisation, mixture-of-experts balancing, sequence packing, in-batch negatives "
        "and quantisation that looks for outliers over the whole batch let one record change what "
        "is computed for another.",
        "Each row has its own gradient and each is clipped, yet one unit moves all of them.",
        "Rows are compared with and without their neighbours, for every objective and, at the "
        "site, on the study's own architecture.",
        "Dettmers et al. 2022, LLM.int8() (outlier columns)",
    ),
    Trap(
        19, "Padding and dropout shared by a batch", WEAKENS,
        "Padding to the longest record changes the numerics of all rows, and a dropout mask "
        "belongs to the batch.",
        "Differences are in the last digits, or hidden by randomness.",
        "A record is padded to a length that follows from itself, and the base stays in evaluation "
        "mode.",
    ),
    Trap(
        20, "Decisions from a private loss that nobody pays for", WEAKENS,
        "Adaptive clipping, early stopping, learning-rate schedules and the choice of the best "
        "checkpoint read un-noised losses or norms.",
        "The noised steps are accounted correctly; the decision is not among them.",
        "The optimiser sees the noised sum alone. A study is judged on public records, or by "
        "noised queries to the sites that are paid for.",
        "Papernot & Steinke 2022, Hyperparameter tuning with Rényi differential privacy",
    ),
    Trap(
        21, "Metrics beside the update", BREAKS,
        "Training losses, counts, norms, timings and the words of exceptions are sent as metrics, "
        "without noise.",
        "Dashboards are expected to show them.",
        "A reply has a fixed list of fields. Every field of every message is compared with that "
        "list, and an internal error leaves the site without its words.",
    ),
    Trap(
        22, "Weights from the true number of examples", WEAKENS,
        "Federated averaging by each client's own count publishes the count and changes by how "
        "much one unit moves the aggregate.",
        "It is the default in federated learning.",
        "Weights are equal, or follow the declared size, which no code derives from the data.",
    ),
    Trap(
        23, "A unit or a relation other than the one that is claimed", WEAKENS,
        "Replacing a unit moves a sum by 2 C where adding or removing one moves it by C, and "
        "clipping by record protects a record although a patient has many.",
        "The number called ε is correct for another statement.",
        "There is one relation, to add or remove one unit, and every report names it. The unit is "
        "in the plan, in each charge and in each line of the step log; a site with a patient "
        "column refuses a plan per record.",
        "Charles et al. 2024; Kifer & Machanavajjhala 2011",
    ),
    Trap(
        24, "Rounding in one's own favour, and work that is repeated for free", FIGURE,
        "σ is rounded down on its way through a file, ε is rounded down in a report, or a round "
        "that is run again after a crash is not charged again.",
        "In the last digit, or not at all: the ledger has no entry for the second time.",
        "Noise is rounded up and ε is shown rounded up. The step log has its line before the noise "
        "is drawn, and a round that is asked for again from another adapter is paid for again.",
    ),
    Trap(
        25, "Sampling that somebody else knows", WEAKENS,
        "A draw from the plan's seed, or one that is written to a log, has no amplification; "
        "neither has the coordinator's own choice of sites.",
        "ε is computed with q as if the draw were secret.",
        "Draws come from the operating system and are written nowhere. The choice of sites is "
        "public and never counted.",
    ),
    Trap(
        26, "A second model that saw the records", BREAKS,
        "A teacher, judge or reference that was trained without privacy on the same records makes "
        "the target of every unit depend on all the others.",
        "The student's own steps are clipped and noised as planned.",
        "The reference is the frozen base, with the adapter off. A site takes only a teacher whose "
        "digest a person listed, or a base that its policy lists (if that allows any base, one "
        "that fedtune knows); a judge sees one record at a time.",
    ),
    Trap(
        27, "Batch statistics in a loss", BREAKS,
        "KTO's reference point from mismatched pairs, centred rewards and group-normalised "
        "advantages subtract a mean over the batch.",
        "It is part of the published method, and the loss is still one number per record.",
        "Reference point and centring are constants of the plan, or are computed within the pair.",
        "Ethayarajh et al. 2024, KTO, section 4.1 (the reference point)",
    ),
    Trap(
        28, "Rows that are parts of a unit", BREAKS,
        "Images cut into tiles, and pairs of passages, put several rows of one record on the "
        "batch's dimension. Clipped apart they move the sum by more than C; miscounted, one row's "
        "part goes to another record.",
        "The number of rows is right for most batches.",
        "Everything of a unit is added up before the norm, and one batch has one number of tiles.",
    ),
    Trap(
        29, "Noise from a table, and rounds that a count begins", WEAKENS,
        "A σ with few digits lies on the wrong side of the target, and a round that starts once "
        "enough new records are there publishes their number.",
        "The plan reads well; the excess over the target is in the last digits.",
        "σ is calibrated by the same accountant that reports ε, and rounded up. Rounds begin by "
        "the clock; a plan that names a count is refused.",
    ),
    Trap(
        30, "A guarantee that depends on the weights that were sent", BREAKS,
        "A coordinator can craft the adapter so that one record's gradient dominates, where a "
        "clip is left out or relaxed for gradients that are taken to be harmless.",
        "With honest weights nothing happens.",
        "Every row is clipped at any weights. Sensitivity is tested with adapters from zero to "
        "very large values, and self-tests run at weights far from the start.",
        "Annamalai & De Cristofaro 2024, Nearly tight black-box auditing of DP machine learning",
    ),
    Trap(
        31, "A selection that follows from other people's records", BREAKS,
        "Which of a patient's records are kept under a cap, or when a patient arrived, is decided "
        "by a set of everything that was ever seen, so that a text that two patients share "
        "makes one depend on the other.",
        "Sums are clipped per unit, but one unit decides what many others contribute.",
        "What selects, orders, rejects or dates a unit's records reads that unit alone. The "
        "shipped worker runs with and without a unit over several rounds; what was found by that "
        "is in found.md.",
    ),
    Trap(
        32, "One bad row that stops the whole site", BREAKS,
        "A file that cannot be parsed or that lacks a column makes the site send noise, so that "
        "one unit removes the contribution of all.",
        "The site reports an honest error and the others go on.",
        "Once a site takes part, rows and files are rejected one at a time.",
    ),
    Trap(
        33, "An exception that a record causes", BREAKS,
        "A record that is too long, too large or refused by a library ends the round with a status "
        "of its own. That is an exact answer about the record, for no ε, and a plan can choose the "
        "threshold.",
        "The status looks like an operational matter.",
        "Lengths are checked against the base before any record is read. What a record raises "
        "costs its own unit, and changes neither status nor size of the reply.",
    ),
    Trap(
        34, "Floating-point results that depend on the neighbours", BREAKS,
        "Which kernel multiplies two matrices is chosen by their shapes. Crafted weights amplify "
        "the last digit until other rows move between 0 and C.",
        "Tests with a tolerance pass.",
        "Blocks have shapes that follow from the record's own bucket, and the values of adapters "
        "are bounded. Rows are compared to the last bit.",
    ),
    Trap(
        35, "Charges of different units added up", FIGURE,
        "A study per record and one per patient are composed as if both bounded the same unit.",
        "The ledger shows a sum, and the sum is too small.",
        "A charge names its unit and the rules by which records were chosen. What is not known is "
        "shown as such, and nothing is trained on top of it until a person accepts it.",
    ),
    Trap(
        36, "Composition that is decided by the records", BREAKS,
        "Whether two datasets overlap, or whether a unit is known, is found out by comparing "
        "records. Whether the next study is admitted is then an answer about one of them.",
        "It looks like diligence: the ledger checks a declaration against the data.",
        "What is composed follows from declarations that a person signed. A patient in two "
        "datasets that are declared disjoint takes part where the key was first; if both had it "
        "before the declaration, in neither.",
    ),
    Trap(
        37, "Row numbers as identities", BREAKS,
        "Where a record is known by its place in the file, one record less renames all that "
        "follow, and withdrawals and memory then refer to other people's rows.",
        "Nothing changes as long as files only grow at the end.",
        "A record without a patient is known by its content and by its number among the records "
        "with the same content.",
    ),
    Trap(
        38, "Subtracting two sums under secure aggregation", BREAKS,
        "Where sites add shares of the noise and only the total is protected, the same update in "
        "two sets of participants gives one site's share away by subtraction.",
        "Each total is noised as planned.",
        "A draw is masked for one set of sites, which the site's ledger records; the draw's "
        "masking key is then deleted. Another attempt is another draw, with new noise, and is "
        "paid for.",
    ),
)  # fmt: skip
