# terraform init -backend-config=bucket=STATE_BUCKET -backend-config=region=REGION
terraform {
  backend "s3" {
    key          = "neuroloop/aws.tfstate"
    encrypt      = true
    use_lockfile = true
  }
}
