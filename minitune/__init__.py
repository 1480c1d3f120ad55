"""minitune: pretrain a small BERT, fine-tune it, prompt it. The lessons, in reading order:

    tokenizer       how text becomes numbers: WordPiece
    data            reviews, their labels, and the split into train, validation and test rows
    batching        packed batches: sequences end to end, without padding
    model           BERT: embeddings, layers, heads
    attention       self-attention, and how FlashAttention computes the same
    masking         which words are hidden, and how
    corpus          a tokenised corpus on disk
    optimizer       Muon, AdamW and the learning-rate schedule
    training        the one training loop
    pretraining     masked-language modelling as a task: batches, loss, evaluation
    initialization  where pretraining starts from
    classification  classifying texts as a task: batches, loss, evaluation
    second_task     guessing masked words while learning to classify
    features        feature extraction: a frozen encoder and a linear classifier
    adapters        small trained layers inside a frozen network
    lora            low-rank changes beside frozen matrices
    ia3             trained vectors that multiply inside a frozen network
    temperature     probabilities that can be taken at their word
    bag_of_words    a network and a bag of words that answer together
    methods         every method as a row of one table
    experiment      what a fine-tuning needs
    soup            one training, or the average of several
    finetuning      one method, from pretrained weights to test accuracy
    checkpoint      a model on disk, as a Hugging Face BERT
    trained         what a method trained of a frozen model, on disk
    peft_files      LoRA and (IA)³ on disk, as the library peft has them
    merging         LoRA folded into the weights; several added up: task arithmetic
    prompting       asking a masked language model with a template
    calibration     why a prompt's answers lean to one side, and how to correct that
    cloze           fine-tuning a prompt, which keeps what it knows without labels
    self_training   learning from reviews that nobody has labelled
    probes          what a model has learned: ten blanks, nearest words
    explain         why this label: what each word adds, and how to test that
    prediction      new texts in, labels out
    doctor          whether a machine, a run or a data file is in order

`commands` is what the scripts do besides training; `fast` makes things fast and computes nothing
new; `support` is what every such program needs.
"""

import os

# On a CPU oneDNN compiles a kernel for every shape of matrix multiplication and keeps 1,024 of
# them, up to a megabyte each. Training needs far fewer.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
