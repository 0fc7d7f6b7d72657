"""``fusion doctor``: what fusing some sources into a target can give, measured on a sample before any training.

Reading order: examine (runs everything), sides (opens stores and tokenizers), diagnosis (counts, one source at a time),
label_classes (digits, CJK, ...), advice (counts -> verdict and settings), page (table, picture, HTML). For scored
responses: responses, responses_page. Both write report_json.
"""
