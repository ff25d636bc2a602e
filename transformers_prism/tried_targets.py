"""Types of models that drafts were tried on, with trees or chains, in transformers' own code: see `docs/compatibility.md`.

Written by `python -m tests.compatibility --update`; rounds of other models are checked (`round_check.py`).
"""

TRIED_TYPES = frozenset(
    """
    afmoe apertus apertus1p5 apertus1p5_text arcee aria aria_text axk1 axk2 aya_vision bailing_hybrid bamba beam bert
    bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom camembert chameleon
    codegen cohere cohere2 cohere2_moe cohere2_vision cohere_compass cohere_compass_text cosmos3_edge cosmos3_edge_text
    cosmos3_omni ctrl cwm data2vec-text dbrx deepseek_ocr2 deepseek_ocr2_text deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 deepseek_vl deepseek_vl_hybrid diffllama dory dots1 dots3_note dots3_note_text electra emu3
    emu3_text_model ernie ernie4_5 ernie4_5_moe ernie4_5_vl_moe ernie4_5_vl_moe_text exaone exaone4 exaone4_5
    exaone_moe falcon falcon_h1 fast_vlm flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4
    gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm46v glm4_moe glm4_moe_lite glm4v glm4v_moe
    glm4v_moe_text glm4v_text glm5_next glm5_next_text glm_moe_dsa glm_ocr glm_ocr_text glmga got_ocr2 gpt2 gpt_bigcode
    gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite4_vision granite4_vision_text granite_docling
    granite_docling_text granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text
    hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl hunyuan_vl_text hy_v3 hy_v4 hy_v4_vl hy_v4_vl_text hyperclovax
    hyperclovax_vision_v2 idefics2 idefics3 inkling2 inkling2_loop inkling2_loop_text inkling2_text inkling_mm_model
    inkling_text internlm3 internvl iquestcoder jais2 janus jetmoe kimi_k25 kimi_linear kolibri1 kosmos-2 kosmos-2.5
    kosmos_2_5_text_model kosmos_2_text_model laguna lara_mini lfm2 lfm2_moe lfm2_vl lfm3 lfm3_vl lighton_ocr llama
    llama4 llama4_text llava llava_next llava_next_video llava_onevision longcat_flash mamba2 marian mbart
    megatron-bert mellum mimo_v2_flash minicpm3 minicpm_ocr minicpmv4_6 minicpmv4_7 minimax_m2 minimax_m3_vl
    minimax_m3_vl_text ministral ministral3 mistral mistral3 mistral4 mistral_large4 mistral_large4_text mixtral mllama
    mllama_text_model modernbert-decoder molmo2 molmo2_text moss_transcribe_diarize muse_glimmer muse_glimmer_text
    muse_spark muse_spark_text mvp nanochat nemotron nemotron_h nemotron_h_omni olmo olmo2 olmo3 olmo_hybrid olmoe opt
    ovis2 paddleocr_vl paddleocr_vl_text paligemma pegasus perception_lm persimmon phi phi3 phimoe plbart
    pp_chart2table qianfan_ocr qwen2 qwen2_5_omni_text qwen2_5_omni_thinker qwen2_5_vl qwen2_5_vl_text qwen2_moe
    qwen2_vl qwen2_vl_text qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
    qwen3_omni_moe_text qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe qwen3_vl_moe_text qwen3_vl_text qwen4_exp
    qwen4_exp_text rembert roberta roberta-prelayernorm roc_bert roformer sarvam_mla sarvam_moe seed_oss shieldgemma2
    smollm3 smolvlm solar_open stablelm starcoder2 step3p5 step3p7 trocr unlimited_ocr unlimited_ocr_text vaultgemma
    video_llama_3 video_llava vipllava whisper xglm xlm-roberta xlm-roberta-xl xmod youtu zamba2 zaya
    """.split()
)
