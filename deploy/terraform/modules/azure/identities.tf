module "rights" {
  source = "../rights"
}

locals {
  blobs = "Microsoft.Storage/storageAccounts/blobServices/containers/blobs"
  actions = {
    list   = ["${local.blobs}/read"]
    read   = ["${local.blobs}/read"]
    write  = ["${local.blobs}/write", "${local.blobs}/add/action"]
    delete = ["${local.blobs}/delete"]
  }
  # "identity right" -> the prefixes it reaches
  grants = merge([
    for identity, rights in module.rights.rights : {
      for right in keys(local.actions) : "${identity} ${right}" => {
        identity = identity
        right    = right
        prefixes = [for prefix, granted in rights : prefix if contains(granted, right)]
      } if anytrue([for granted in values(rights) : contains(granted, right)])
    }
  ]...)
}

resource "azurerm_user_assigned_identity" "part" {
  for_each            = module.rights.rights
  name                = "${var.name}-${each.key}"
  resource_group_name = azurerm_resource_group.main.name
  location            = azurerm_resource_group.main.location
}

resource "azurerm_federated_identity_credential" "part" {
  for_each            = azurerm_user_assigned_identity.part
  name                = "kubernetes"
  resource_group_name = azurerm_resource_group.main.name
  parent_id           = each.value.id
  issuer              = azurerm_kubernetes_cluster.main.oidc_issuer_url
  audience            = ["api://AzureADTokenExchange"]
  subject             = "system:serviceaccount:neuroloop:${each.key}"
}

resource "azurerm_role_definition" "right" {
  for_each          = local.actions
  name              = "${var.name} ${each.key} blobs"
  scope             = azurerm_resource_group.main.id
  assignable_scopes = [azurerm_resource_group.main.id]
  permissions {
    data_actions = each.value
  }
}

# Listing and reading are one action in Azure, told apart by the sub-operation Blob.List.
resource "azurerm_role_assignment" "part" {
  for_each           = local.grants
  scope              = azurerm_storage_account.store.id
  role_definition_id = azurerm_role_definition.right[each.value.right].role_definition_resource_id
  principal_id       = azurerm_user_assigned_identity.part[each.value.identity].principal_id
  principal_type     = "ServicePrincipal"
  condition_version  = contains(each.value.prefixes, "") ? null : "2.0"
  condition = contains(each.value.prefixes, "") ? null : join(" AND ", concat(
    each.value.right == "list" ? ["(SubOperationMatches{'Blob.List'})"] : each.value.right == "read" ? ["(NOT SubOperationMatches{'Blob.List'})"] : [],
    ["(${join(" OR ", [
      for prefix in each.value.prefixes : each.value.right == "list"
      ? "@Request[Microsoft.Storage/storageAccounts/blobServices/containers/blobs:prefix] StringStartsWith '${prefix}'"
      : "@Resource[Microsoft.Storage/storageAccounts/blobServices/containers/blobs:path] StringStartsWith '${prefix}'"
    ])})"],
  ))
}
