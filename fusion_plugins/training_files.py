"""Names and form of the files that a training leaves in its output folder, for those who write and those who read them.

The trainer's adapter writes them, `fusion report` reads them; neither imports the other.
"""

#: what each source contributed to the fused datasets, one entry per dataset
FUSED_REPORT = "fusion_report.json"
#: the best answers that were chosen, and the preference pairs
SFT_REPORT = "fusion_sft.json"
PAIRS_REPORT = "fusion_pairs.json"
#: configuration, versions, example texts and figures of a training
TRAINING_RECORD = "fusion_training.json"
#: version of the form of :data:`TRAINING_RECORD`
TRAINING_VERSION = 1
#: rows and tokens per row that it keeps as examples
EXAMPLES, EXAMPLE_TOKENS = 8, 160
#: log entries of steps that it keeps, spread evenly, and of evaluations
MOST_ENTRIES = 2000
