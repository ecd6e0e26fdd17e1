"""Seeded bugs of bases, adapters, files and ranks by site."""

from __future__ import annotations

from tests.mutants.mutant import Mutant
from tests.mutants.mutant import one as _one
from tests.mutants.places import (
    BENEATH,
    CACHE,
    GRADIENTS,
    MEDIA,
    NETWORK,
    PARTS,
    POLICY,
    ROUNDS,
    STATES,
    T_BENEATH,
    T_CLIPS,
    T_FILES,
    T_NARROW,
    T_NETWORK,
    T_POST,
    T_RANKS,
    T_SEEN,
    T_STATES,
    T_TILES,
    TOKENS,
    TRAINING,
    VIDEO,
)

MODEL_MUTANTS = (
    _one(
        "states", "states-without-their-positions", CACHE,
        "parts = (passage.input_ids.tobytes(), positions.tobytes(), *",
        "parts = (passage.input_ids.tobytes(), *",
        "tests/models/test_states_shared.py::"
        "test_the_same_tokens_with_other_targets_have_states_of_their_own",
        "a record trains on the states of another one's targets",
    ),
    _one(
        "media", "an-image-in-one-line", "fedtune/core/bases/architecture.py",
        "torch.stack([time, time + within // side, time + within % side])",
        "torch.stack([time, time, time])",
        "tests/models/test_media.py::test_positions_round_an_image_are_transformers_own",
        "an image's rows and columns are not seen as such",
    ),
    _one(
        "loaded", "another-studys-factor-stays", NETWORK,
        "or self._loaded[1] != versions:", "or False:",
        T_NETWORK + "test_a_is_loaded_again_only_after_something_wrote_to_it",
        "a site trains over the A of the study before it",
    ),
    _one(
        "states", "the-file-is-not-authenticated", STATES,
        "plaintext = AESGCM(self.key).decrypt(_NONCE, block, self.record)",
        "from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes\n"
        '            counter = modes.CTR(_NONCE + (2).to_bytes(4, "big"))\n'
        "            cipher = Cipher(algorithms.AES(self.key), counter)\n"
        "            plaintext = cipher.decryptor().update(block[:-16])",
        T_STATES + "test_an_altered_block_is_noticed_and_its_states_computed_again",
        "trains on whatever somebody wrote there",
    ),
    Mutant(
        "states", "the-file-is-in-the-clear", STATES,
        (
            ("block = AESGCM(key).encrypt(_NONCE, plaintext, record)", "block = plaintext"),
            (
                "plaintext = AESGCM(self.key).decrypt(_NONCE, block, self.record)",
                "plaintext = block",
            ),
        ),
        (T_STATES + "test_what_is_in_the_file_is_not_readable",),
        "hidden states can be turned back into text",
    ),
    Mutant(
        "states", "a-block-passes-for-anothers", STATES,
        (
            ("encrypt(_NONCE, plaintext, record)", "encrypt(_NONCE, plaintext, None)"),
            ("decrypt(_NONCE, block, self.record)", "decrypt(_NONCE, block, None)"),
        ),
        (T_STATES + "test_a_block_is_bound_to_its_record",),
        "the seal says nothing of whose states they are",
    ),
    _one(
        "states", "withdrawn-states-are-held", CACHE,
        "self.network.states[name] = self._states[index] = state",
        'self.network.states[name] = self._states[index] = state\n'
        '            PREFIX_STORE.__dict__.setdefault("all", []).append(state)',
        "tests/client/test_site.py::"
        "test_a_withdrawn_patients_states_are_erased_and_the_others_kept",
        "who withdrew stays in memory and file",
    ),
    _one(
        "states", "an-adapter-below-the-cut", "fedtune/core/models/split.py",
        "first_adapted = len(layers) - lora.last_layers",
        "first_adapted = len(layers) - lora.last_layers + 1",
        "tests/models/test_states_shared.py::"
        "test_below_the_cut_nothing_is_trained_and_nothing_is_dropped",
        "what is kept changes as the adapter learns",
    ),
    _one(
        12, "any-module-may-be-adapted", POLICY,
        'listed += [("modules", module, policy.modules) for module in study.lora.modules]',
        "pass",
        "tests/traps/test_trap_12_peft_options.py::"
        "test_a_module_outside_the_allow_list_is_refused",
        "embed_tokens has no per-record gradient",
    ),
    _one(
        12, "a-start-read-off-the-data", "fedtune/core/config/study.py",
        'a_init: Literal["seed", "public"]', 'a_init: Literal["seed", "public", "eva", "pissa"]',
        "tests/traps/test_trap_12_peft_options.py::"
        "test_an_option_outside_the_allow_list_is_unknown",
        "EVA looks at private records",
    ),
    _one(
        14, "the-check-before-training-is-blind", TRAINING, "    if not lowered:\n",
        "    if norm < 0:\n",
        "tests/models/test_network.py::test_the_check_catches_a_gradient_of_the_wrong_sign",
        "ε accrues and nothing is learnt",
    ),
    _one(
        14, "the-optimiser-never-steps", TRAINING, "        optimizer.step()\n", "",
        "tests/test_training.py::test_a_round_lowers_the_loss_of_its_own_records[sgd]",
        "the adapter never changes, as in issue 820 of Opacus",
    ),
    _one(
        14, "saved-under-a-wrapper's-names", NETWORK,
        "self.model.save_pretrained(str(folder), save_embedding_layers=False)",
        "self.model.save_pretrained(str(folder), save_embedding_layers=False, state_dict={\n"
        '                f"_module.{n}": p for n, p in self.model.state_dict().items()})',
        "tests/models/test_network.py::"
        "test_plain_peft_in_a_fresh_process_gives_the_same_logits[B]",
        "an adapter that does not load",
    ),
    _one(
        20, "learning-rate-from-the-private-loss", TRAINING, "        optimizer.step()\n",
        '        optimizer.param_groups[0]["lr"] *= min(1.0, _mean_loss(data, study) / 10)\n'
        "        optimizer.step()\n",
        T_POST + "test_the_update_depends_on_the_noised_sums_alone", "a schedule that is not paid",
    ),
    Mutant(
        20, "stops-where-the-private-loss-rises", TRAINING,
        (
            (
                "    for step in range(study.training.local_steps):\n",
                "    best = _mean_loss(data, study)\n"
                "    for step in range(study.training.local_steps):\n",
            ),
            (
                "        optimizer.zero_grad()\n",
                "        optimizer.zero_grad()\n"
                "        if _mean_loss(data, study) >= best:\n"
                "            break\n",
            ),
        ),
        (T_POST + "test_the_update_depends_on_the_noised_sums_alone",), "early stopping",
    ),
)  # fmt: skip


MEDIA_MUTANTS = (
    _one(
        28, "one-tile-of-a-projector-counts", GRADIENTS,
        "per_record = per_passage.sum(dim=1)", "per_record = per_passage[:, 0]",
        T_TILES + "test_tiles_are_added_up_before_any_norm", "four fifths of an image are lost",
    ),
    _one(
        28, "tiles-of-two-records-are-added", GRADIENTS,
        "per_passage = gradient.view(n_records, passages, *gradient.shape[1:])",
        "per_passage = gradient.view(passages, n_records, *gradient.shape[1:]).transpose(0, 1)",
        T_TILES + "test_tiles_are_added_up_before_any_norm", "a unit's clip holds another's tiles",
    ),
    _one(
        28, "an-image-fills-the-next-records-places", PARTS,
        "ordered = features.gather(", "ordered = features.roll(1, 0).gather(",
        T_TILES + "test_a_records_image_reaches_no_other_record", "a record's loss reads another",
    ),
    _one(
        28, "tile-counts-share-a-batch", CACHE,
        "members.setdefault(bucket_of(index), [])",
        "members.setdefault(bucket_of(index)._replace(tiles=1), [])",
        T_TILES + "test_one_batch_has_one_number_of_tiles",
        "the number of tiles that a batch declares is wrong for some of its records",
    ),
    _one(
        "media", "states-go-by-the-text-alone", CACHE, "*([media] if media else [])", "",
        T_SEEN + "test_states_are_the_files_own", "a record trains on another record's image",
    ),
    Mutant(
        "media", "links-lead-out-of-the-folder", BENEATH,
        (
            ("dir_fd=folder, follow_symlinks=False", "dir_fd=folder"),
            ("os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC", "os.O_DIRECTORY | os.O_CLOEXEC"),
            ("descriptor(part, os.O_RDONLY | os.O_NOFOLLOW, folder)",
             "descriptor(part, os.O_RDONLY, folder)"),
        ),
        ("tests/data/test_media.py::test_paths_stay_inside_the_folder",),
        "a data file reads what lies elsewhere on the machine",
    ),
    _one(
        "media", "a-path-is-looked-up-before-it-is-judged", BENEATH,
        "        if refuse_path(name):\n",
        "        (self._root / name).resolve()\n        if refuse_path(name):\n",
        T_BENEATH + "test_a_name_that_could_lead_out_is_judged_by_its_text",
        "another account sees that one record is there; a mount that does not answer holds the "
        "site",
    ),
    _one(
        "media", "a-link-is-looked-up-before-it-is-judged", BENEATH,
        "        parts = _parts(target)\n",
        "        self._root.joinpath(*inside, target).resolve()\n"
        "        parts = _parts(target)\n",
        T_BENEATH + "test_nobody_outside_sees_that_a_name_was_looked_up",
        "another account sees that one record is there",
    ),
    _one(
        "media", "a-link-that-comes-meanwhile-is-followed", BENEATH,
        "descriptor(part, os.O_RDONLY | os.O_NOFOLLOW, folder)",
        "descriptor(part, os.O_RDONLY, folder)",
        T_BENEATH + "test_a_link_that_takes_a_files_place_meanwhile_is_not_followed",
        "a record reads another folder's file",
    ),
    _one(
        "media", "a-path-of-any-length", BENEATH, "if refuse_path(name):", "if False:",
        T_BENEATH + "test_a_name_that_no_file_can_have_is_looked_up_nowhere",
        "one row's path of some megabytes takes hours of the vault",
    ),
    _one(
        "media", "a-file-is-read-for-each-spelling", MEDIA,
        "if path not in self._contents:", "if True:",
        T_FILES + "test_a_patients_file_is_read_once_however_many_records_name_it",
        "a patient's rows of a few bytes have one file read a million times",
    ),
    _one(
        "media", "what-cannot-be-kept-is-read", MEDIA,
        'file.read(size + 1) if size <= most else b""', "file.read(BYTES + 1)",
        T_FILES + "test_what_a_patient_has_no_bytes_left_for_is_not_read",
        "a patient's rows of a few bytes have gigabytes read for nothing",
    ),
    _one(
        "media", "a-recording-is-converted-for-each-row", "fedtune/core/modalities/audio_text.py",
        "samples = length(record.media, self._rate)",
        "samples = len(sound(record.media, self._rate))",
        T_SEEN + "test_a_recording_is_converted_for_no_record_that_the_cap_leaves_out",
        "a patient's rows that name one recording take hours of the vault",
    ),
    _one(
        "media", "what-could-not-be-decoded-is-unknown", "fedtune/core/data/identity.py",
        "return [*found, *({_media_member(file)} for file in sorted(read.undecoded))]",
        "return found",
        T_FILES + "test_a_file_whose_child_fails_is_known_all_the_same",
        "a private image passes for public if a machine was busy when it was compared",
    ),
    _one(
        "video", "a-clip-decides-how-many-frames", VIDEO,
        "*[shown] * (FRAMES - len(found))]", "shown]",
        T_CLIPS + "test_every_clip_has_as_many_frames",
        "how long a clip is decides the shapes of what is computed",
    ),
    _one(
        "video", "a-decoders-error-goes-out", VIDEO,
        "    except Exception as error:  # FFmpeg", "    except ValueError as error:  # FFmpeg",
        T_CLIPS + "test_no_error_of_a_decoder_goes_out",
        "one patient's file, or its words, end the site's round",
    ),
    _one(
        "video", "a-clips-pixels-are-not-added-up", VIDEO, "if pixels > DECODED:", "if False:",
        T_CLIPS + "test_the_pixels_of_all_frames_are_counted",
        "one clip keeps a site decoding for hours",
    ),
    _one(
        "video", "a-clip-never-ends", VIDEO, "if number > PACKETS:", "if False:",
        T_CLIPS + "test_an_endless_stream_ends", "one clip keeps a site reading",
    ),
    _one(
        "video", "ffmpeg-guesses-the-format", VIDEO, "format=_demuxer(body)", "format=None",
        T_CLIPS + "test_a_format_is_named_and_nothing_else_is_opened",
        "a playlist in a patient's record opens other files",
    ),
    _one(
        "media", "the-ledger-does-not-know-the-file", TOKENS,
        'members.add(b"media\\0" + record.media.file)', "pass",
        T_SEEN + "test_members_of_the_ledger_know_the_file",
        "the same image under other words passes for a new one",
    ),
    _one(
        "media", "the-ledger-knows-a-file-by-what-is-kept-of-it", TOKENS,
        "record.media.file)", "record.media.digest)",
        T_SEEN + "test_members_of_the_ledger_know_the_file",
        "another release keeps another form, and all records count as new ones",
    ),
    _one(
        "media", "a-declared-image-is-another-ones", "fedtune/core/data/identity.py",
        "record.media.file)", "record.media.digest)",
        T_FILES + "test_the_ledger_knows_a_file_by_its_own_bytes",
        "an image that was declared is not found in a ledger under other words",
    ),
    _one(
        "media", "a-file-is-decoded-in-the-vault", MEDIA,
        'if sys.platform == "linux" and system_calls.is_known():', "if False:",
        T_FILES + "test_no_library_reads_a_file_in_this_process",
        "one patient's file takes hours and gigabytes, or the vault itself",
    ),
    _one(
        "media", "all-files-in-one-child", "fedtune/core/data/records.py",
        "units[row.key if self._by_patient else str(number)].append(number)",
        'units[""].append(number)',
        T_FILES + "test_a_hostile_file_costs_its_own_patient_and_nobody_else",
        "a child that one patient's file took over answers for all patients",
    ),
    _one(
        "media", "more-than-an-image", MEDIA,
        "    if len(content):\n        raise Rejected(UNDECODED)\n", "",
        T_FILES + "test_what_a_child_answers_is_not_trusted[video]",
        "what a child answers is believed",
    ),
    _one(
        "media", "a-sample-that-is-no-number", MEDIA,
        "if not len(samples) or not np.isfinite(samples).all():", "if not len(samples):",
        T_FILES + "test_what_a_child_answers_is_not_trusted[audio]",
        "a recording makes every loss of its batch no number",
    ),
    _one(
        "media", "any-words-are-a-reason", MEDIA,
        "return next(reason for reason in REASONS[kind] if reason.encode() == content)",
        "return bytes(content).decode()",
        T_FILES + "test_what_a_child_answers_is_not_trusted[image]",
        "a record's words are in the log",
    ),
    _one(
        "media", "a-patients-images-fill-the-memory", MEDIA,
        "if left >= 0 else", "if True else",
        T_FILES + "test_a_patients_files_are_bounded_together",
        "one patient's small files become all memory of the vault",
    ),
    _one(
        "media", "a-patients-files-fill-the-memory", MEDIA,
        "_read_open(file, self._kind, min(BYTES, self._left))", "_read_open(file, self._kind)",
        T_FILES + "test_a_patients_files_are_bounded_together",
        "one patient's files take all memory of the vault",
    ),
    _one(
        "media", "more-places-than-the-image-has", "fedtune/core/modalities/image_text.py",
        "        if actual != expected:\n", "        if actual < expected:\n",
        T_SEEN + "test_place_holders_are_counted", "a text that writes image tokens of its own",
    ),
)  # fmt: skip


RANK_MUTANTS = (  # of sites that train fewer ranks of one adapter
    _one(
        "ranks", "the-first-columns-alone-are-trained", "fedtune/core/models/rank_slice.py",
        "start = min((round_ - 1) % blocks * rank,", "start = min(0 * blocks,",
        T_RANKS + "test_the_released_change_is_the_weighted_mean_of_the_sites_own",
        "a site of few ranks never trains the others",
    ),
    _one(
        "ranks", "a-site-trains-every-column", GRADIENTS,
        "trained_slice(name, p.detach(), columns)",
        "trained_slice(name, p.detach(), ALL)",
        T_RANKS + "test_rows_are_columns_of_the_whole_rows",
        "clipped and noised over numbers that are not sent",
    ),
    _one(
        "ranks", "columns-left-out-stay-in-memory", GRADIENTS,
        "    selected = gradient[..., columns].clone()\n    gradient.zero_()\n",
        "    selected = gradient[..., columns].clone()\n",
        T_RANKS + "test_columns_that_are_not_trained_are_wiped", "gradients nobody noised are kept",
    ),
    _one(
        "ranks", "few-numbers-weigh-less", ROUNDS,
        "self.strategy.add(pad_update(result.update, whole, columns), float(weight))",
        "weight *= sum(a.size for a in part.values())\n"
        "            self.strategy.add(pad_update(result.update, whole, columns), float(weight))",
        T_NARROW + "test_the_aggregate_is_the_mean_with_zeros_for_what_a_site_does_not_train",
        "the aggregate is no longer the weighted mean of what the sites changed",
    ),
    _one(
        "ranks", "bound-over-numbers-not-trained", ROUNDS,
        "sum(array.size for array in part.values())",
        "sum(array.size for array in whole.values())",
        T_NARROW + "test_an_update_longer_than_its_own_numbers_allow_is_dropped",
        "a site of few ranks may send longer updates than its noise explains",
    ),
    _one(
        "ranks", "any-rank-is-taken", "fedtune/server/admission.py",
        "lora.min_rank <= rank <= lora.rank else 0", "True else 0",
        T_NARROW + "test_a_rank_that_the_plan_does_not_allow_is_refused",
        "a site chooses its own shapes",
    ),
    _one(
        "ranks", "a-rank-changes-on-the-way", "fedtune/server/admission.py",
        "self.lora_ranks.get(name, rank) != rank", "self.lora_ranks.update({name: rank})",
        T_NARROW + "test_a_rank_stays_for_the_study_also_over_a_restart_of_the_coordinator",
        "what the report says of a site is not what it trained",
    ),
    _one(
        "ranks", "fewer-ranks-than-the-plan-wants", POLICY,
        "    if rank >= least:\n", "    if rank > 0:\n",
        "tests/test_lora_ranks_plans.py::"
        "test_a_site_trains_fewer_ranks_only_where_the_plan_counts_on_it",
        "budget is spent on updates that no coordinator takes",
    ),
)  # fmt: skip

DIGEST, FIND = "fedtune/core/bases/digest.py", "fedtune/core/bases/find.py"
ARCHITECTURE = "fedtune/core/bases/architecture.py"
T_BASE = "tests/models/test_base.py::"
KEPT, TEACHER = "fedtune/core/models/kept_state.py", "fedtune/core/models/teacher.py"
CHECKS = "fedtune/core/vault/site_checks.py"
T_KEPT = "tests/models/test_kept_state.py::"
KEPT_MUTANTS = (
    _one(
        "kept", "state-of-a-text-stays", KEPT, "        if not kept:\n", "        if number < 0:\n",
        T_KEPT + "test_a_base_that_leaves_sparse_attention_for_good_is_refused "
        + T_KEPT + "test_what_changes_with_a_reading_may_not",
        "one patient's text changes what is computed of every other",
    ),
    _one(
        "kept", "whatever-the-first-text-changes-may-stay", KEPT,
        "before.items() <= state.items() if number == 0", "True if number == 0",
        T_KEPT + "test_a_base_that_leaves_sparse_attention_for_good_is_refused",
        "which text is read first decides how all are read",
    ),
    _one(
        "kept", "trying-a-cut-may-change-the-base", "fedtune/core/models/network.py",
        "        if not before.items() <= describe_state(self._backbone).items():\n",
        "        if not before:\n",
        T_KEPT + "test_a_base_that_its_first_text_changes_for_good_is_refused",
        "what the first text changed for good is taken for how the base always was",
    ),
    _one(
        "kept", "a-base-of-any-layers", "fedtune/core/bases/find.py",
        "    _check_plain(base.name, model)\n", "",
        "tests/models/test_base.py::test_a_base_of_other_layers_or_attention_is_not_loaded",
        "int8 layers with outlier columns: one record takes a column out of int8 for a whole block",
    ),
    _one(
        "kept", "quantised-within", "fedtune/core/bases/digest.py",
        "            yield from settings_in(part, *names)\n", "            pass\n",
        "tests/models/test_base.py::test_refused",
        "the text part of a base is quantised by a table that nobody looked for",
    ),
    _one(
        "kept", "another-file-in-place-of-the-hashed-one", DIGEST,
        "for name, keys in REDIRECTS.items():", "for name, keys in dict[str, list[str]]().items():",
        T_BASE + "test_refused",
        "two models have one digest",
    ),
    _one(
        "kept", "templates-beside-the-hashed-one", DIGEST,
        "    if os.path.lexists(folder / TEMPLATES):\n", "    if not TEMPLATES:\n",
        T_BASE + "test_refused",
        "a site's records are written with a template of which the digest says nothing",
    ),
    _one(
        "kept", "attention-of-whatever-repository", DIGEST,
        '    if untried := sorted(name.lstrip("_") for name, value in asked '
        "if value not in ATTENTION):\n",
        "    if untried := sorted(name for name, _ in asked if not ATTENTION):\n",
        T_BASE + "test_refused",
        "a part of the configuration has kernels of others looked for and loaded",
    ),
    _one(
        "kept", "a-base-patches-the-process", DIGEST,
        '"_attn_implementation", "fusion_config")', '"_attn_implementation")',
        T_BASE + "test_no_configuration_changes_classes_of_transformers",
        "a base that is refused has changed what the next one computes",
    ),
    _one(
        "kept", "a-tokenizer-of-the-whole-folder", FIND,
        "tokenizer = fast(\n"
        '            tokenizer_object=Tokenizer.from_str(json.dumps(parts["json"])),\n'
        '            chat_template=parts["chat_template"],\n'
        "            **special,\n"
        "        )",
        "tokenizer = fast.from_pretrained(base.path, **special)",
        T_BASE + "test_one_digest_has_one_tokenizer",
        "two sites that list one digest train on other tokens",
    ),
    _one(
        "kept", "whispers-language-is-not-hashed", DIGEST,
        "special = _special(config) | {key: config[key] for key in START if config.get(key)}",
        "special = _special(config)",
        "tests/models/test_media.py::"
        "test_a_transcript_begins_as_whispers_own_tokenizer_has_it",
        "a study in one language trains its transcripts as those of another",
    ),
    _one(
        "kept", "two-files-of-special-tokens", DIGEST,
        "    if any(token not in (None, special[key]) for key, token in preferred.items()):\n",
        "    if not special:\n",
        T_BASE + "test_refused",
        "transformers ends its texts with another token than fedtune",
    ),
    _one(
        "kept", "a-file-that-was-changed-back", DIGEST,
        "if digest(folder) != expected or _stamps(folder) != before:",
        "if digest(folder) != expected:",
        T_BASE + "test_a_file_that_changes_between_hash_and_load_is_not_used",
        "another base is loaded than the one that was hashed",
    ),
    _one(
        "kept", "an-adapter-as-its-own-file-says", "fedtune/core/models/loaded.py",
        "        network = _adapted(network, base, study, arrays)\n",
        "        from peft import PeftModel\n\n"
        "        network = PeftModel.from_pretrained(network, str(run / ADAPTER)).eval()\n",
        "tests/models/test_whole.py::test_one_digest_of_a_run_is_one_model",
        "a teacher with a listed digest teaches anything",
    ),
    _one(
        "kept", "a-runs-digest-without-its-plan", "fedtune/core/models/loaded.py",
        '"arrays": lora.digest(arrays), "plan": plan}', '"arrays": lora.digest(arrays)}',
        "tests/models/test_whole.py::test_the_digest_of_a_run_sees_what_its_plan_computes",
        "one digest has several scales, templates and classes",
    ),
    _one(
        "kept", "weights-beside-the-hashed-ones", DIGEST,
        "    if others:\n", "    if not WEIGHTS:\n",
        T_BASE + "test_refused",
        "a folder holds weights of which the digest says nothing",
    ),
    _one(
        "kept", "the-loader-chooses-among-the-files", FIND,
        "            None,\n            config=empty.config,\n"
        "            state_dict=read_tensors(base.path),\n",
        "            base.path,\n            config=empty.config,\n",
        T_BASE + "test_what_is_loaded_is_what_is_hashed",
        "the base that a site has listed is named, and another one computes",
    ),
    _one(
        "kept", "an-architecture-by-the-folders-name", FIND,
        'if not isinstance(config.get("model_type"), str):', "if not config:",
        T_BASE + "test_refused",
        "two models have one digest",
    ),
    _one(
        "kept", "a-person-is-asked-to-run-code", "fedtune/core/bases/wheel.py",
        "    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds that it waits for a yes\n",
        "",
        T_BASE + "test_nobody_is_asked_to_run_a_models_own_code",
        "a yes at a terminal runs what the base's author wrote",
    ),
    _one(
        "kept", "a-fault-that-is-no-exception-ends-the-vault", "fedtune/core/errors.py",
        "return not isinstance(error, Stopped |",
        "return isinstance(error, Exception) or not isinstance(error, BaseException |",
        T_BASE + "test_a_fault_of_the_loader_that_is_no_exception_is_the_bases",
        "a base by which the loader fails ends the site's half with the records",
    ),
    _one(
        "kept", "a-token-beyond-the-base", "fedtune/core/models/cache.py",
        "not 0 <= int(known.min()) <= int(known.max()) < rows", "rows < 0",
        "tests/models/test_token_rows.py::test_its_record_alone_takes_no_part",
        "on a GPU one record's token ends the round of everybody",
    ),
    _one(
        "kept", "a-token-before-the-first", "fedtune/core/models/cache.py",
        "not 0 <= int(known.min()) <= int(known.max()) < rows", "int(known.max()) >= rows",
        "tests/models/test_token_rows.py::test_its_record_alone_takes_no_part",
        "on a GPU one record's token ends the round of everybody",
    ),
    _one(
        "kept", "a-table-of-another-size", ARCHITECTURE,
        "return min(*sizes, *(", "return min(2**31, *(",
        "tests/models/test_token_rows.py::test_a_further_table_counts",
        "a token has a row of the embeddings, and none of a further table",
    ),
    _one(
        "kept", "further-embeddings-for-each-layer", FIND,
        "        foreign.add(key)\n", "        pass\n",
        "tests/models/test_coupling.py::test_a_base_that_couples_records_by_design_is_refused",
        "a record's tokens are looked for among those of the others in its block",
    ),
    _one(
        "kept", "patches-of-a-whole-block", FIND, " or home.startswith(COUPLING)", "",
        "tests/models/test_coupling.py::test_a_base_that_couples_records_by_design_is_refused",
        "one record decides the shapes of all in its block",
    ),
    _one(
        "kept", "any-architecture-shares-its-blocks", CACHE,
        "self._alone = alone or not network.shares_blocks", "self._alone = alone",
        "tests/models/test_coupling.py::"
        "test_a_block_of_an_architecture_that_is_not_listed_is_one_record",
        "an architecture that nobody tried may add up the records of a block",
    ),
    _one(
        "kept", "a-part-of-a-base-may-be-anything", ARCHITECTURE,
        '{kind for _, kind in settings_in(config.to_dict(), "model_type")} <= SHARING',
        'config.to_dict()["model_type"] in SHARING',
        "tests/models/test_coupling.py::test_a_part_that_is_not_listed_counts",
        "a text model that nobody tried hides behind a known base",
    ),
    _one(
        "kept", "the-shortest-texts-are-not-tried", KEPT,
        "SHORT = (1, 2, 4, 7, 8)", "SHORT = (8,)",
        T_KEPT + "test_a_base_that_leaves_sparse_attention_for_good_is_refused",
        "a text of fewer tokens changes for good what is computed of every other",
    ),
    _one(
        "kept", "an-array-is-where-it-lies", "fedtune/core/models/module_state.py",
        "return hashlib.sha256(value.tobytes()).hexdigest(), value.dtype, value.shape",
        "return id(value)",
        T_KEPT + "test_whatever_a_module_holds_is_compared_by_its_content",
        "what one text leaves in an array is not seen",
    ),
    _one(
        "kept", "a-weight-is-written-past-the-count", KEPT,
        "    if sum_weights(model) != weights:\n", "    if model is None:\n",
        T_KEPT + "test_whatever_a_module_holds_is_compared_by_its_content",
        "what one text leaves in a large tensor is not seen",
    ),
    _one(
        "kept", "a-text-may-depend-on-its-neighbours", KEPT,
        "if again and not torch.equal(results[length], result):", "if number < 0:",
        T_KEPT + "test_a_base_that_adds_up_its_neighbours_is_refused",
        "a record's states at the cut hold those of others",
    ),
    _one(
        "kept", "a-plan-stays-checked-when-its-network-is-new", KEPT,
        "if study.digest in _checked.setdefault(network, set()):",
        "_checked.setdefault(network, set())\n"
        "    if any(study.digest in passed for passed in _checked.values()):",
        T_KEPT + "test_another_network_is_checked_anew",
        "a network that nobody tried reads records",
    ),
    _one(
        "kept", "a-plan-learns-for-good", CHECKS,
        "    if kind not in passed:\n",
        "    if not any(kind in held for held in _trains.values()):\n",
        T_KEPT + "test_another_network_is_checked_anew",
        "a network that nobody tried trains",
    ),
    _one(
        "kept", "a-teacher-is-not-tried", TEACHER,
        "    _check_keeps_nothing(model, study.objective)\n", "",
        T_KEPT + "test_a_teacher_with_sparse_attention_is_refused",
        "one note changes what is taught about all others",
    ),
    _one(
        "kept", "a-teacher-reads-beyond-its-positions", TEACHER,
        "    if len(ids) > model.room:\n", "    if len(ids) < 0:\n",
        T_KEPT + "test_a_record_beyond_the_teachers_positions_is_left_out_by_itself",
        "the longest record decides the frequencies of all",
    ),
    _one(
        "kept", "the-self-test-reads-short-texts-alone", "fedtune/core/training/selftest.py",
        "partial(_check_lengths, study, tiny)", "float",
        T_KEPT + "test_the_self_test_refuses_it_too",
        "what a threshold of length changes is not seen",
    ),
    _one(
        "kept", "the-self-test-shares-states-at-the-cut", "fedtune/core/training/selftest.py",
        "        self.network.states.clear()  # the frozen part computes `data` anew, whoever "
        "held a state\n", "",
        T_KEPT + "test_isolation_sees_what_couples_records_below_the_cut",
        "isolation compares the frozen part with itself",
    ),
)  # fmt: skip

MUTANTS = (*MODEL_MUTANTS, *MEDIA_MUTANTS, *RANK_MUTANTS, *KEPT_MUTANTS)
