"""Plain references: slow, obvious, and used by tests and benchmarks alike."""

import math

# Alignment, projection and fusion: plain Python, one obvious loop each.


def levenshtein(a, b):
    """Edit distance of two sequences, unit costs."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def published_cost(source, target, source_mark, target_mark, family):
    """Token distance of the published code: boundary characters removed, and FuseChat's exception for bare ones."""
    a = source.replace(source_mark, "") if source_mark else source
    b = target.replace(target_mark, "") if target_mark else target
    if family == "fusechat" and not (a and b):
        a, b = (source.replace(source_mark, target_mark) if source_mark else source), target
    return levenshtein(a, b)


def dtw(costs, family="fusellm"):
    """Time warping over a matrix of costs: (path of (i, j) from (0, 0), total cost)."""
    n, m = len(costs), len(costs[0])
    total = {}
    for i in range(n):
        for j in range(m):
            before = [total[p] for p in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if p in total]
            total[i, j] = costs[i][j] + min(before, default=0)
    path = [(n - 1, m - 1)]
    while path[-1] != (0, 0):
        i, j = path[-1]
        order = (
            [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
            if family == "fusellm"
            else [(i - 1, j - 1), (i, j - 1), (i - 1, j)]
        )
        path.append(min((p for p in order if p in total), key=lambda p: total[p]))
    return path[::-1], total[n - 1, m - 1]


def same_prefix_rows(source, target):
    """For each target token the source token after which the same bytes have been read; -1 for none."""
    rows = []
    for t in range(len(target)):
        prefix = b"".join(target[: t + 1])
        rows.append(next((u for u in range(len(source)) if b"".join(source[: u + 1]) == prefix), -1))
    return rows


def longest_beginning(token, known):
    """The longest of a set of tokens that a token begins with; empty for none."""
    return next((token[:end] for end in range(len(token), 0, -1) if token[:end] in known), b"")


def project_row(candidates, gold, label, source, target, target_ids, exact, *, known=None, first_token=False):
    """Project one row with the chain correction, as ``core/project.py`` describes it.

    ``candidates`` (source id -> probability of the row), ``gold`` (list of (source id, probability of it, candidates of
    the row that predicts it): the source's next tokens until the label's bytes are covered), ``label`` (target id),
    ``source`` and ``target`` (lists of bytes), ``target_ids`` and ``exact`` (source id -> target id or -1, -> bool).
    """
    known = known or set(target)
    wanted = target[label]
    spelled = b"".join(source[y] for y, _, _ in gold)
    first = gold[0][0]
    mass = 1.0
    for _, p, _ in gold[:-1]:
        mass *= p
    last, p, row = gold[-1]
    if spelled != wanted and len(gold) > 1:
        rest = wanted[len(spelled) - len(source[last]) :]
        p = sum(q for z, q in ({last: p} | row).items() if source[z].startswith(rest))
    result = {label: mass * p}
    for z, q in candidates.items():
        if z == first:
            continue
        if len(gold) > 1 and wanted.startswith(source[z]) and source[z] != wanted:
            continue
        to = target_ids[z]
        if not exact[z] and not first_token and longest_beginning(source[z], known) == wanted:
            to = label
        if to >= 0:
            result[to] = result.get(to, 0.0) + q
    return result


def candidates(record, row):
    """The stored candidates of one row of a record, source id -> probability."""
    pairs = zip(record.topk.ids[row], record.topk.logprobs[row], strict=True)
    return {int(z): math.exp(q) for z, q in pairs if z >= 0}


def fuse_text(records, target_ids, target_ends, maps, source_tokens, target_tokens, width):
    """Records of one text -> fused rows (target id -> probability), MinCE by bytes; no chat, no special tokens.

    ``records``: objects with the fields of a Record; ``maps``: (target_ids, exact) per source.
    """
    best = min(range(len(records)), key=lambda s: records[s].ce_per_byte)
    fused, known = [], set(target_tokens)
    for s, record in enumerate(records):
        projected = []
        row_at = {int(end): u for u, end in enumerate(record.text.ends)}
        for t in range(len(target_ids) - 1):
            u = row_at.get(int(target_ends[t]), -1)
            if u < 0 or u + 1 >= len(record.text.input_ids):
                projected.append({})
                continue
            gold = []
            for v in range(u + 1, len(record.text.input_ids)):
                gold.append(
                    (
                        int(record.text.input_ids[v]),
                        math.exp(record.topk.token_logprobs[v - 1]),
                        candidates(record, v - 1),
                    )
                )
                if record.text.ends[v] >= target_ends[t + 1]:
                    break
            row = project_row(
                candidates(record, u),
                gold, int(target_ids[t + 1]), source_tokens[s], target_tokens, *maps[s], known=known,
            )  # fmt: skip
            kept = sorted(row.items(), key=lambda item: (-item[1], item[0]))[:width]
            total = sum(q for _, q in kept)
            projected.append({to: q / total for to, q in kept})
        fused.append(projected)
    return fused[best]


def begins_with(model, tokens, prefix, wanted):
    """Probability that a token model goes on with bytes that begin with ``wanted``, over all ways to spell them.

    ``model(prefix) -> {token id: probability}``; ``tokens``: list of bytes.
    """
    if not wanted:
        return 1.0
    total = 0.0
    for z, p in model(prefix).items():
        if tokens[z].startswith(wanted):
            total += p
        elif wanted.startswith(tokens[z]):
            total += p * begins_with(model, tokens, prefix + tokens[z], wanted[len(tokens[z]) :])
    return total


def nearest_token(token, vocabulary):
    """Index of and distance to the first token of a vocabulary at the least edit distance."""
    distances = [levenshtein(token, other) for other in vocabulary]
    return distances.index(min(distances)), min(distances)
